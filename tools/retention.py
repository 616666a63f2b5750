"""Starts `skvr-retention` from a checkout."""

from skvr_dist.commands.retention import main

if __name__ == "__main__":
    main()
