"""Entry point for `python -m`."""

from skvr_dist.commands.estimate import main

if __name__ == "__main__":
    main()
