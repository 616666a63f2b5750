"""Starts `skvr-inspect` from a checkout."""

from skvr_dist.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
