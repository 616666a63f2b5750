"""Starts `skvr-profile` from a checkout."""

from skvr_dist.commands.profile_steps import main

if __name__ == "__main__":
    main()
