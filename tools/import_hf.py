"""Starts `skvr-import` from a checkout."""

from skvr_dist.commands.import_hf import main

if __name__ == "__main__":
    main()
