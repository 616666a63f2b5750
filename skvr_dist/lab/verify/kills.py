"""Kill the ranks of a run at random moments, and compare its final weights with an undisturbed run's."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.cluster.processes import ranks_among
from skvr_dist.errors import RunInterrupted
from skvr_dist.run.folder import RunFolder

_LOOK_SECONDS = 0.05
_LONGEST_DELAY_SECONDS = 0.3  # a few steps, evaluations and saves of the small runs that this is for
_LAST_STEPS = 20  # left in peace, so that a kill comes before the end
_PATIENCE_SECONDS = 300.0
_TAIL = 3000  # characters of a console


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    step: int
    """The last step that was reported."""
    ranks: int
    """How many were killed at once."""
    during: str
    """`save`, `evaluation` or `step`, as far as the run's folder tells."""
    seconds_to_next_start: float
    """Until the ranks of the next attempt existed."""


def kill_while_it_runs(
    command: Sequence[str], folder: Path, *, num_ranks: int, kills: int, steps: int, seed: int
) -> list[Kill]:
    """Start a command that keeps a run running, kill one rank or all of them `kills` times, and wait for its end.

    Args:
        folder: the run's output folder, where its progress is read.
        steps: of the run, more than `kills` and 20; the kills are spread over all but the last 20.

    Returns:
        what was killed; fewer than asked for if the run ended before.

    Raises:
        RunInterrupted: the command did not end well, or nothing moved for minutes.
    """
    draw = random.Random(seed)
    done: list[Kill] = []
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        keeper = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            seen, reported = {keeper.pid}, -1.0
            ranks = _next_ranks(keeper, num_ranks, seen)
            for step in tqdm(sorted(draw.sample(range(1, steps - _LAST_STEPS), kills)), unit="kill", disable=None):
                _wait_for_step(keeper, folder, step, newer_than=reported)
                time.sleep(draw.uniform(0, _LONGEST_DELAY_SECONDS))
                chosen = [draw.choice(ranks)] if draw.random() < 0.5 else ranks
                if not all(rank.is_running() for rank in chosen):
                    break
                moment = (_reported(folder)[0], len(chosen), _doing(folder))
                for rank in chosen:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        rank.kill()
                killed = time.monotonic()
                reported = _reported(folder)[1]
                seen |= {rank.pid for rank in ranks}
                ranks = _next_ranks(keeper, num_ranks, seen)
                done.append(Kill(*moment, seconds_to_next_start=time.monotonic() - killed))
            code = keeper.wait(timeout=_PATIENCE_SECONDS)
        finally:
            keeper.terminate()
            keeper.wait()
    if code != 0:
        said = Path(log.name).read_text(encoding="utf-8")[-_TAIL:]
        raise RunInterrupted(
            f"the run ended with code {code} after {len(done)} kills, and this on its console:\n{said}"
        )
    return done


def largest_difference(run: Path, other: Path) -> tuple[str, float]:
    """The weight whose relative difference between two runs' latest checkpoints is largest, and that difference."""
    ours, theirs = Checkpoint(run), Checkpoint(other)
    differences = {
        name: float((ours.weight(name) - theirs.weight(name)).norm() / theirs.weight(name).norm())
        for name in theirs.weight_names()
    }
    worst = max(differences, key=lambda name: differences[name])
    return worst, differences[worst]


def _next_ranks(keeper: subprocess.Popen[bytes], count: int, seen: set[int]) -> list[psutil.Process]:
    """The ranks of an attempt after those seen, once all are there; none if the run has ended."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while keeper.poll() is None:
        children = psutil.Process(keeper.pid).children(recursive=True)
        ranks = ranks_among(children)
        if len(ranks) == count and not seen & {rank.pid for rank in ranks}:
            return ranks
        _be_patient(deadline, "started no ranks")
    return []


def _wait_for_step(keeper: subprocess.Popen[bytes], folder: Path, step: int, newer_than: float) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while keeper.poll() is None:
        reached, when = _reported(folder)
        if reached >= step and when > newer_than:
            return
        _be_patient(deadline, f"did not reach step {step}")


def _be_patient(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise RunInterrupted(f"the run {what} within {_PATIENCE_SECONDS:.0f} s")
    time.sleep(_LOOK_SECONDS)


def _reported(folder: Path) -> tuple[int, float]:
    """The last step of the run, and when it was written."""
    steps = [int(record["step"]) for record in RunFolder(folder).metric_records()]
    return (steps[-1], RunFolder(folder).metrics.stat().st_mtime) if steps else (0, 0.0)


def _doing(folder: Path) -> str:
    if any(RunFolder(folder).checkpoints.glob("*.partial")):
        return "save"
    records = RunFolder(folder).metric_records()
    evaluations = [record["step"] for record in records if any(tag.startswith("evaluate/") for tag in record)]
    every = min(evaluations, default=0)
    step = records[-1]["step"]
    return "evaluation" if every and step % every == 0 and step not in evaluations else "step"
