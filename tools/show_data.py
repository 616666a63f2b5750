"""Starts `skvr-show-data` from a checkout."""

from skvr_dist.commands.show_data import main

if __name__ == "__main__":
    main()
