"""A case: something that users or clusters do to a run of several hosts, and how it ended."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from skvr_dist.lab import small_run
from skvr_dist.lab.hosts.hosts import ROOT, Hosts, Setup, shell_variables
from skvr_dist.run.folder import RunFolder

STEPS = 4
_SECONDS, _LOOK_SECONDS = 1800.0, 0.1
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""What users of hosts without GPUs have in their shell: one thread a rank, since all hosts share few cores."""


@dataclass
class Ending:
    """How a case ended."""

    found: str
    """In a few words, for the table."""
    misses: list[str] = field(default_factory=list)
    """What is not as it must be; none if it ended well."""

    def expect(self, holds: bool, sentence: str) -> None:
        """Note what is not as it must be."""
        if not holds:
            self.misses.append(sentence)


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    kind: Literal["start", "input", "fault"]
    what: str
    """What is done, in words."""
    play: Callable[[Lab], Ending]
    quick: bool = False
    """Whether it is among the few that the tests play."""
    programs: Sequence[str] = ()
    """Beside those that every case needs."""


@dataclass(frozen=True)
class Outcome:
    """A case that was played."""

    case: Case
    ending: Ending
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether everything is as it must be."""
        return not self.ending.misses


def play(case: Case, lab: Lab) -> Outcome:
    """Play a case; what it did not foresee is a miss."""
    started = time.monotonic()
    try:
        ending = case.play(lab)
    except Exception as error:
        ending = Ending("failed", [f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"])
    return Outcome(case, ending, time.monotonic() - started)


class Lab:
    """What cases share: a folder, data to train on, and the losses that every start must have.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.reference = cache(self._reference)

    @cached_property
    def data(self) -> Path:
        """A small data set."""
        folder = self.folder / "data"
        if not folder.exists():
            small_run.make_data(folder)
        return folder

    def hosts(self, number: int = 2, **setup: Any) -> Hosts:
        """Hosts to enter; `setup` are the fields of `Setup`. Every login sets what an installed checkout would."""
        login = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **setup.pop("login", {})}
        folder = self.folder / "hosts"
        shutil.rmtree(folder, ignore_errors=True)
        return Hosts(number, folder, Setup(login=login, **setup))

    def run_folder(self, name: str) -> Path:
        """A folder for a run, new."""
        folder = self.folder / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        return folder

    def arguments(self, run: Path, **keys: Any) -> list[str]:
        """Arguments of the pretraining command for a run of a few steps; `keys` with `__` for the dot."""
        few = {"train__steps": STEPS, "train__log_every_steps": 1, "evaluate__every_steps": 1000}
        return small_run.arguments(run, self.data, **few | {"parallel__timeout_seconds": 30.0} | keys)

    def _reference(self, ranks: int, steps: int = STEPS, **keys: Any) -> dict[int, float]:
        """Losses of the undisturbed run on this machine."""
        run = self.run_folder("reference")
        self.train_here(ranks, "launch/pretrain.py", *self.arguments(run, **{"train__steps": steps, **keys}))
        return losses(run)

    def train_here(self, ranks: int, *words: str, until: Path | None = None) -> None:
        """Train with ranks of this machine.

        Args:
            words: the program and its arguments.
            until: a checkpoint at which the run is told to end; None: it ends by itself.

        Raises:
            RuntimeError: it failed.
        """
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        env = {**shell_variables(), **CPU, "PYTHONPATH": str(ROOT)}
        log, deadline = self.folder / "here.txt", time.monotonic() + _SECONDS
        with log.open("wb") as said:
            started = subprocess.Popen([*launcher, *words], cwd=ROOT, env=env, stdout=said, stderr=said)
        while started.poll() is None and time.monotonic() < deadline and not (until and until.exists()):
            time.sleep(_LOOK_SECONDS)
        is_there = until is not None and until.exists()
        if started.poll() is None:
            started.terminate()  # torchrun passes it on, and the ranks save
        if started.wait(timeout=_SECONDS) and not is_there:
            raise RuntimeError(f"the reference failed: {log.read_text(errors='replace')[-2000:]}")


def losses(run: Path) -> dict[int, float]:
    """Losses of a run by step; the last one of a step that was done twice. Empty if it has none yet."""
    return {
        int(record["step"]): record["train/loss"]
        for record in RunFolder(run).metric_records()
        if "train/loss" in record
    }


def write_hostfile(hosts: Hosts, slots: int = 1, names: Sequence[str] | None = None) -> Path:
    """A hostfile of all hosts, or of these names."""
    file = hosts.folder / "hostfile"
    file.write_text("".join(f"{name} slots={slots}\n" for name in names or hosts.names))
    return file


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome for machines."""
    case, ending = outcome.case, outcome.ending
    return {
        "case": case.name,
        "kind": case.kind,
        "what": case.what,
        "found": ending.found,
        "misses": ending.misses,
        "seconds": round(outcome.seconds, 1),
        "passed": outcome.is_well,
    }


def from_record(record: dict[str, Any], case: Case) -> Outcome:
    """The outcome that `as_record` made a record of.

    Raises:
        KeyError: it is no such record.
    """
    return Outcome(case, Ending(record["found"], record["misses"]), record["seconds"])
