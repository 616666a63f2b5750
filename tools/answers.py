"""Starts `skvr-answers` from a checkout."""

from skvr_dist.commands.answers import main

if __name__ == "__main__":
    main()
