"""Starts `skvr-plot` from a checkout."""

from skvr_dist.commands.plot import main

if __name__ == "__main__":
    main()
