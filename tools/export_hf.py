"""Starts `skvr-export` from a checkout."""

from skvr_dist.commands.export_hf import main

if __name__ == "__main__":
    main()
