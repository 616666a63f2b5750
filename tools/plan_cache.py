"""Starts `skvr-plan-cache` from a checkout."""

from skvr_dist.commands.plan_cache import main

if __name__ == "__main__":
    main()
