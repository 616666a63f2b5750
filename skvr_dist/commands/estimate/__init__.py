"""Work out in closed forms what training or serving needs, before it is started.

    skvr-estimate train --config quickstart --config qwen3-8b --gpus 64
    skvr-estimate serve exports/routed --memory-gib 80 --context 8192

Starts nothing, needs no GPU and no data.
"""

from __future__ import annotations

from skvr_dist.command import run_command, run_subcommand
from skvr_dist.commands.estimate import serve, train


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Run the subcommand that is named first; returns the exit code."""
    return run_subcommand(__doc__, {"train": train, "serve": serve})
