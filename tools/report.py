"""Starts `skvr-report` from a checkout."""

from skvr_dist.commands.report import main

if __name__ == "__main__":
    main()
