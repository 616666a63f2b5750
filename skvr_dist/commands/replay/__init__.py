"""Replay a workload against vLLM at several cache strategies: speed, and the answers that change most.

    skvr-replay make --kind support --requests 200 --rate 2 --output trace.jsonl
    skvr-replay run trace.jsonl --model exports/planned --profiles full standard bulk --output runs/replay

`make` needs no vLLM, `run --url` none on this machine.
"""

from __future__ import annotations

from skvr_dist.command import run_command, run_subcommand
from skvr_dist.commands.replay import make, run_trace


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Run the subcommand that is named first; returns the exit code."""
    return run_subcommand(__doc__, {"make": make, "run": run_trace})
