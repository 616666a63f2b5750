"""Starts `skvr-update-export` from a checkout."""

from skvr_dist.commands.update_export import main

if __name__ == "__main__":
    main()
