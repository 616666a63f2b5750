"""Starts `skvr-pretrain` from a checkout."""

from skvr_dist.commands.pretrain import main

if __name__ == "__main__":
    main()
