"""Starts `skvr-replay` from a checkout."""

from skvr_dist.commands.replay import main

if __name__ == "__main__":
    main()
