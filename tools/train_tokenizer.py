"""Starts `skvr-train-tokenizer` from a checkout."""

from skvr_dist.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
