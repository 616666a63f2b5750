"""Starts `skvr-sweep` from a checkout."""

from skvr_dist.commands.sweep import main

if __name__ == "__main__":
    main()
