"""What `python -m` and `deepspeed --module` start."""

from skvr_dist.commands.verify import main

if __name__ == "__main__":
    main()
