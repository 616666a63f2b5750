"""Jobs of Slurm, through submitit: one job per run, on one node, in which the ranks are started."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from skvr_dist.cluster.interrupt import SIGNALS
from skvr_dist.errors import EXIT_AGAIN, UserError
from skvr_dist.run.folder import RunFolder
from skvr_dist.sweep.experiment import Place
from skvr_dist.sweep.plan import PlannedRun
from skvr_dist.sweep.ranks import Ranks

_LOOK_SECONDS = 1.0
_MOST_JOBS = 10**4


class SlurmJob:
    """A run that Slurm has been given.

    Args:
        job: submitit's.
    """

    def __init__(self, job: Any) -> None:
        self._job = job
        self._look_at = 0.0

    def poll(self) -> int | None:
        """The exit code of the run; 75 if the job ended without one: it was preempted, cancelled or out of time."""
        if time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except Exception:  # submitit has several for a job without a result
            return EXIT_AGAIN

    def stop(self) -> None:
        """Cancel the job, which sends SIGTERM: its ranks save and end."""
        self._job.cancel()


class Slurm:
    """Slurm as a place of runs.

    A sweep that is started again finds the jobs of the one before by their numbers, which the runs' folders hold.

    Args:
        place: its `slurm` are parameters of submitit; `cluster: local` there tries it out without Slurm.
        folder: for submitit's own files.

    Raises:
        UserError: submitit or Slurm is missing, or a parameter is unknown.
    """

    def __init__(self, place: Place, folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                "place.kind is slurm, for which the package submitit is missing; install skvr-dist[slurm], or give "
                "--place local or print"
            ) from None
        self.at_once, self._ranks, self._folder = place.at_once or _MOST_JOBS, place.ranks, folder
        parameters = dict(place.slurm)
        cluster = parameters.pop("cluster", "slurm")
        self._job_class = submitit.SlurmJob if cluster == "slurm" else submitit.LocalJob
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"place.slurm is not as submitit takes it ({reason}); put it in order") from None

    def start(self, run: PlannedRun) -> SlurmJob:
        """Submit a run, or go on with the job that an earlier sweep has submitted and that is not over."""
        if known := run.folder.notes().get("slurm_job"):
            job = self._job_class(self._folder, known)
            with contextlib.suppress(Exception):  # Slurm may have forgotten it
                if not job.done():
                    return SlurmJob(job)
        job = self._executor.submit(train_here, str(run.folder.path), self._ranks)
        run.folder.note(slurm_job=str(job.job_id))
        return SlurmJob(job)


def train_here(folder: str, ranks: int) -> int:
    """Train a run on this host, in a job; returns its exit code. Signals are passed to the ranks."""
    started = Ranks(RunFolder(folder), ranks, {})
    for number in {*SIGNALS, signal.SIGUSR2}:  # the last is submitit's for a job whose time is up
        signal.signal(number, lambda *_: started.stop())
    while (code := started.poll()) is None:
        time.sleep(_LOOK_SECONDS)
    return code
