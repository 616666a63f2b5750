"""Measure speed against its bounds.

    skvr-bench step
    skvr-bench generate --help
    deepspeed --num_gpus 2 tools/bench.py save --json save.json parallel.pipeline=2

`step` and `save` also run over the ranks of a launcher. Exit code 1: a bound is missed.
"""

from __future__ import annotations

from skvr_dist.command import run_command, run_subcommand
from skvr_dist.commands.bench import attention, data, generate, loss, save, serve, step


def main() -> None:
    """Entry point."""
    run_command(run, over_ranks=True)


def run() -> int | None:
    """Run the subcommand that is named first; returns the exit code."""
    subcommands = {"step": step, "save": save, "data": data, "loss": loss, "attention": attention}
    subcommands |= {"generate": generate, "serve": serve}
    return run_subcommand(__doc__, subcommands, over_ranks=("step", "save"))
