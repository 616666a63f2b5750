"""Entry point for `python -m` and `deepspeed --module`."""

from skvr_dist.commands.verify import main

if __name__ == "__main__":
    main()
