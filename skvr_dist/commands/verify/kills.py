"""Kill a small run's ranks at random moments, keep it running, and compare its weights with an undisturbed run's.

    skvr-verify kills --kills 30 --json kills.json

Prepares a little text of Python's standard library and trains on it twice at the same time: without disturbance, and
under skvr-keep-running with one rank or all of them killed (SIGKILL) during steps, evaluations and saves. Exits 1
when the run did not take all kills, or when a weight differs by more than the bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, at_least, conclude
from skvr_dist.errors import RunInterrupted, UserError

if TYPE_CHECKING:
    from skvr_dist.lab.verify.kills import Kill

BOUND = 1e-6


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--kills", type=at_least(1, 10_000), default=30, metavar="N")
    parser.add_argument(
        "--ranks", type=at_least(2, 64), default=4, metavar="N", help="a multiple of 2 stages (default: 4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    add_json(parser)


def run(options: Namespace) -> int:
    """Train twice, kill, and compare; returns the exit code."""
    if options.ranks % 2:
        raise UserError(f"--ranks {options.ranks} is odd; the runs have 2 stages, so give a multiple of 2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    steps = 3 * options.kills + 24
    with tempfile.TemporaryDirectory() as folder:
        kills, worst, difference = _train_and_kill(Path(folder), options, steps)
    pause = median(kill.seconds_to_next_start for kill in kills) if kills else 0.0
    figure = Figure(
        f"{len(kills)} of {options.kills} kills in {steps} steps, {pause:.1f} s (median) until the next start; "
        f"largest relative difference of a weight {difference:.1e} ({worst})",
        f"{BOUND:.0e}",
        len(kills) == options.kills and difference <= BOUND,
    )
    record = {"kills": kills, "asked": options.kills, "steps": steps, "ranks": options.ranks}
    record |= {"difference": difference, "worst": worst, "bound": BOUND, "passed": figure.met}
    return conclude([figure], table=_table(kills), record=record, json_file=options.json)


def _train_and_kill(folder: Path, options: Namespace, steps: int) -> tuple[list[Kill], str, float]:
    """Both runs at the same time; returns the kills, and the weight that differs most with its relative difference."""
    from skvr_dist.lab.small_run import make_data
    from skvr_dist.lab.verify.kills import kill_while_it_runs, largest_difference

    make_data(folder / "data")
    calm, killed = folder / "calm", folder / "killed"
    keeper = [sys.executable, "-m", "skvr_dist.commands.keep_running", "--output-dir", str(killed)]
    keeper += ["--restarts", str(options.kills), "--", *_pretraining(killed, folder / "data", options.ranks, steps)]
    undisturbed = subprocess.Popen(
        _pretraining(calm, folder / "data", options.ranks, steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        kills = kill_while_it_runs(
            keeper, killed, num_ranks=options.ranks, kills=options.kills, steps=steps, seed=options.seed
        )
        console, _ = undisturbed.communicate()
    finally:
        undisturbed.terminate()
        undisturbed.wait()
    if undisturbed.returncode != 0:
        raise RunInterrupted(f"the undisturbed run failed:\n{console.decode()}")
    return kills, *largest_difference(killed, calm)


def _table(kills: Sequence[Kill]) -> str:
    counts = Counter((kill.during, "all" if kill.ranks > 1 else "one") for kill in kills)
    rows = [[during, ranks, count] for (during, ranks), count in sorted(counts.items())]
    return tabulate(rows, headers=["killed during", "ranks", "kills"], tablefmt="github")


def _pretraining(output: Path, data: Path, ranks: int, steps: int) -> list[str]:
    """The command line of a run on 2 stages, on a port of its own."""
    from skvr_dist.cluster.launcher import free_port
    from skvr_dist.lab.small_run import arguments

    launcher = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()"]
    launcher += ["--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "error"]
    return [*launcher, "--module", "skvr_dist.commands.pretrain", *arguments(output, data, train__steps=steps)]
