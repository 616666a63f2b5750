"""Starts `skvr-bench` from a checkout."""

from skvr_dist.commands.bench import main

if __name__ == "__main__":
    main()
