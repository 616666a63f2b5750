"""Starts `skvr-finetune` from a checkout."""

from skvr_dist.commands.finetune import main

if __name__ == "__main__":
    main()
