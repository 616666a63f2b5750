"""Starts `skvr-preflight` from a checkout."""

from skvr_dist.commands.preflight import main

if __name__ == "__main__":
    main()
