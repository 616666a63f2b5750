"""Prove that any layout resumes from a checkpoint of any other.

    skvr-verify reshard --matrix quick
    skvr-verify reshard --matrix full --json reshard.json

Each layout trains 2 steps, saves, and trains 5 more; each layout then loads each of those checkpoints and trains the
same 5 steps. Loaded state must be the same bit for bit, losses and the optimizer's state after the steps to 1e-6
(relative), every single weight and moment to 1e-5.
Runs on the CPU of this machine. Exits 1 when a pair misses.
"""

from __future__ import annotations

import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from tqdm import tqdm

from skvr_dist.command import add_json, write_json
from skvr_dist.errors import EXIT_MISSED

MATRICES = {
    "quick": ["single", "PP2xDP2 ZeRO-1", "TP2xDP2 ZeRO-3"],
    "full": [
        "single",
        "DP2 ZeRO-2",
        "DP2 ZeRO-3",
        "TP4 SP",
        "PP2",
        "PP4 uneven",
        "PP2xDP2 ZeRO-1",
        "TP2xPP2",
        "TP2xPP2xDP2 SP ZeRO-3",
    ],
}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--matrix", choices=list(MATRICES), default="quick")
    add_json(parser, "write the outcomes there too")


def run(options: Namespace) -> int:
    """Try every pair; returns the exit code."""
    from skvr_dist.lab.verify.reshard import as_table, reshard

    layouts = MATRICES[options.matrix]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        pairs = reshard(layouts, Path(folder))
        outcomes = []
        for outcome in tqdm(pairs, total=len(layouts) ** 2, unit="pair", disable=None):
            outcomes.append(outcome)
            if outcome.missed:  # not only in the table, which a long run prints at its end
                tqdm.write(f"missed: {outcome}")
            if options.json:
                write_json(options.json, outcomes)
    print(as_table(outcomes))
    missed = [outcome for outcome in outcomes if outcome.missed]
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(outcomes)} pairs in {minutes:.1f} min, {len(missed)} missed")
    return EXIT_MISSED if missed else 0
