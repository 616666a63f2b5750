"""Starts `skvr-keep-running` from a checkout."""

from skvr_dist.commands.keep_running import main

if __name__ == "__main__":
    main()
