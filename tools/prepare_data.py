"""Starts `skvr-prepare-data` from a checkout."""

from skvr_dist.commands.prepare_data import main

if __name__ == "__main__":
    main()
