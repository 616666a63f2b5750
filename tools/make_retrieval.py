"""Starts `skvr-make-retrieval` from a checkout."""

from skvr_dist.commands.make_retrieval import main

if __name__ == "__main__":
    main()
