"""Starts `skvr-dryrun` from a checkout."""

from skvr_dist.commands.dryrun import main

if __name__ == "__main__":
    main()
