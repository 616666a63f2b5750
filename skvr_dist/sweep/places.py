"""Where runs run: what the sweep asks of a place, and this machine as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch

from skvr_dist.cluster.processes import end_marked_processes
from skvr_dist.errors import UserError
from skvr_dist.sweep.experiment import Place
from skvr_dist.sweep.plan import PlannedRun
from skvr_dist.sweep.ranks import Ranks

MARK = "SKVR_SWEEP"
"""Variable in the environment of every rank: the experiment's folder."""


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def stop(self) -> None:
        """Ask it to save and end."""


class Machine(Protocol):
    """What starts runs."""

    at_once: int
    """Runs that it takes at a time."""

    def start(self, run: PlannedRun) -> Job:
        """Start a run; there is room for it."""


class ThisMachine:
    """Runs packed on the GPUs of this host, or on its cores where there are none (or DS_ACCELERATOR is cpu).

    Each run has GPUs of its own, or its share of the cores. With more runs at once than GPUs have room for, several
    share each GPU: small models leave most of one idle.

    Args:
        folder: of the experiment; processes that an earlier sweep into it has left are ended.

    Raises:
        UserError: a run needs more GPUs than there are.
    """

    def __init__(self, place: Place, folder: Path) -> None:
        self._ranks, self._mark = place.ranks, str(folder.resolve())
        gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
        cores = len(os.sched_getaffinity(0))
        fitting = (gpus or max(cores, place.ranks)) // place.ranks
        self.at_once = place.at_once or fitting
        if gpus and not fitting:
            raise UserError(f"place.ranks {place.ranks} needs {place.ranks} GPUs, but there are {gpus}; lower it")
        self._places_on_gpus = fitting if gpus else 0
        self._threads = max(1, cores // (self.at_once * place.ranks))
        self._places: list[Ranks | None] = [None] * self.at_once
        end_marked_processes(MARK, self._mark)

    def start(self, run: PlannedRun) -> Ranks:
        """Start a run on a place that is free."""
        free = next(n for n, ranks in enumerate(self._places) if ranks is None or ranks.poll() is not None)
        self._places[free] = started = Ranks(run.folder, self._ranks, self.variables(free))
        return started

    def variables(self, number: int) -> dict[str, str]:
        """Of the environment of a run's ranks, on the place with this number."""
        if self._places_on_gpus:
            first = number % self._places_on_gpus * self._ranks
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = shown.split(",") if shown else [str(gpu) for gpu in range(self._places_on_gpus * self._ranks)]
            return {MARK: self._mark, "CUDA_VISIBLE_DEVICES": ",".join(names[first : first + self._ranks])}
        return {MARK: self._mark, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self._threads))}
