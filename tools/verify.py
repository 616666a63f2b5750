"""Starts `skvr-verify` from a checkout."""

from skvr_dist.commands.verify import main

if __name__ == "__main__":
    main()
