"""Starts `skvr-estimate` from a checkout."""

from skvr_dist.commands.estimate import main

if __name__ == "__main__":
    main()
