"""Prove that training is right, whatever the layout and whatever dies, and that tools find what they promise.

    skvr-verify layouts --matrix quick
    skvr-verify reshard --matrix quick
    skvr-verify kills --kills 30
    skvr-verify hosts
    skvr-verify estimate
    skvr-verify experiments
    skvr-verify kernels
    skvr-verify gpu-dry
    skvr-verify search runs/quickstart/routed --calibrate data/stdlib/train

Each runs on the CPU of this machine. Exit code 1: a figure is missed.
"""

from __future__ import annotations

from skvr_dist.command import run_command, run_subcommand
from skvr_dist.commands.verify import estimate, experiments, gpu_dry, hosts, kernels, kills, layouts, reshard, search


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Run the subcommand that is named first; returns the exit code."""
    subcommands = {
        "layouts": layouts,
        "reshard": reshard,
        "kills": kills,
        "hosts": hosts,
        "estimate": estimate,
        "experiments": experiments,
        "kernels": kernels,
        "gpu-dry": gpu_dry,
        "search": search,
    }
    return run_subcommand(__doc__, subcommands)
