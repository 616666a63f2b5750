"""Average the last checkpoints of a run into one checkpoint.

    skvr-average runs/mine runs/mine-average --last 5
    skvr-average runs/mine runs/mine-average --last 10 --decay 0.8

OUT then holds a checkpoint of weights alone, at the newest one's step: retention, export and report take it, and a new
run starts from it with train.initial_weights=OUT. With --decay each checkpoint counts for that share of the next newer
one (an exponential mean); without it all count alike.
"""

from __future__ import annotations

from pathlib import Path

from tabulate import tabulate

from skvr_dist.command import add_json, at_least, new_parser, parse, run_command, write_json
from skvr_dist.errors import UserError


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Average, and print what counted for how much."""
    parser = new_parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to make; it must not hold anything")
    parser.add_argument("--last", type=at_least(2), default=3, metavar="K", help="checkpoints (default: 3)")
    parser.add_argument("--decay", type=float, metavar="D", help="between 0 and 1 (default: a plain mean)")
    add_json(parser, "write what was averaged there")
    options = parse(parser)
    if options.decay is not None and not 0 < options.decay < 1:
        raise UserError(f"--decay {options.decay} must be between 0 and 1; leave it out for a plain mean")

    from skvr_dist.checkpoint.average import last_checkpoints, shares, write_average

    checkpoints = last_checkpoints(options.run, options.last)
    folder = write_average(checkpoints, options.decay, options.output)
    counts = shares(len(checkpoints), options.decay)
    rows = [[each.step, str(each.folder), f"{share:.1%}"] for each, share in zip(checkpoints, counts, strict=True)]
    print(tabulate(rows, headers=["step", "checkpoint", "counts for"], tablefmt="github", disable_numparse=True))
    print(f"\nwritten: {folder}")
    if options.json:
        steps = [checkpoint.step for checkpoint in checkpoints]
        write_json(options.json, {"checkpoint": str(folder), "steps": steps, "shares": counts})


if __name__ == "__main__":
    main()
