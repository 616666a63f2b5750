"""Starts `skvr-average` from a checkout."""

from skvr_dist.commands.average import main

if __name__ == "__main__":
    main()
