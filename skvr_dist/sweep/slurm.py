"""Jobs of Slurm, through submitit: one job per run, on one node, in which the ranks are started."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
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
_ASK_SECONDS = 15.0
"""Between two questions to Slurm; one is about all jobs."""
_SECONDS_TO_SEE = 15.0  # what a node has written; a network's file system may take a moment
_MOST_JOBS = 10**4
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
}


class Queue:
    """Which jobs are over, as squeue tells.

    submitit asks sacct, which knows nothing where Slurm keeps no accounts, and asks every ten minutes after a while.
    """

    def __init__(self) -> None:
        self._live: set[str] | None = None
        self._asked_at = -math.inf

    def is_over(self, job: str, since: float) -> bool:
        """Whether a job has ended; not while Slurm gives no answer.

        Args:
            since: when the job was known to be there; what was heard before says nothing about it.
        """
        if time.monotonic() - self._asked_at > _ASK_SECONDS:
            self._live, self._asked_at = _live_jobs(), time.monotonic()
        return self._live is not None and self._asked_at > since and job not in self._live


def _live_jobs() -> set[str] | None:
    """Jobs of this user that are not over; None if Slurm does not say."""
    command = ["squeue", "--noheader", "--all", "--states=all", f"--user={os.getuid()}", "--format=%A %T"]
    # The user's own defaults, of SQUEUE_PARTITION and others, would leave jobs out.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    told = (line.split() for line in done.stdout.splitlines())
    return {words[0] for words in told if len(words) == 2 and words[1] not in _OVER}


class SlurmJob:
    """A run that Slurm has been given.

    Args:
        job: submitit's.
        queue: what knows whether it is over; None for a job here or on another cluster, of which submitit is asked.
        since: when it was known to be there.
    """

    def __init__(self, job: Any, queue: Queue | None, since: float) -> None:
        self._job, self._queue, self._since = job, queue, since
        self._look_at = 0.0
        self._over_since: float | None = None

    def poll(self) -> int | None:
        """The exit code of the run; 75 if the job ended without one: it was preempted, cancelled or out of time."""
        if time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if not self.is_over():
            self._over_since = None
            return None
        if not self._has_result():
            self._over_since = self._over_since or time.monotonic()
            return EXIT_AGAIN if time.monotonic() - self._over_since > _SECONDS_TO_SEE else None
        try:
            return int(self._job.result())
        except Exception:  # submitit has several for a job without a result
            return EXIT_AGAIN

    def is_over(self) -> bool:
        """Whether it has ended, as far as is known."""
        if self._has_result():
            return True
        if self._queue is not None:
            return self._queue.is_over(self._job.job_id, self._since)
        try:
            return bool(self._job.done())
        except Exception:  # nobody knows it any more
            return True

    def _has_result(self) -> bool:
        file: Path = self._job.paths.result_pickle
        with contextlib.suppress(OSError):  # NFS looks again into a folder that has changed
            file.parent.chmod(file.parent.stat().st_mode)
        return file.exists()

    def stop(self) -> None:
        """Cancel the job, which sends SIGTERM: its ranks save and end."""
        self._job.cancel(check=False)  # it may be over


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
        self._queue: Queue | None = None
        if cluster == "slurm":  # the sweep submits a preempted run again; Slurm would start it a second time
            more = dict(parameters.get("slurm_additional_parameters") or {})
            if not {"clusters", "M"} & more.keys():  # squeue tells of this cluster
                self._queue = Queue()
            parameters["slurm_additional_parameters"] = {"no-requeue": True, **more}
        try:
            self._executor = submitit.AutoExecutor(folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"place.slurm is not as submitit takes it ({reason}); put it in order") from None

    def start(self, run: PlannedRun) -> SlurmJob:
        """Submit a run, or go on with the job that an earlier sweep has submitted and that is not over."""
        if known := run.folder.notes().get("slurm_job"):
            earlier = SlurmJob(self._job_class(self._folder, known), self._queue, since=0.0)
            if not earlier.is_over():
                return earlier
        try:
            job = self._executor.submit(train_here, str(run.folder.path), self._ranks)
        except Exception as error:  # submitit's own, of what sbatch has said
            raise UserError(
                f"Slurm does not take the job of {run.name} ({' '.join(str(error).split())}); correct place.slurm, or "
                f"lower place.at_once"
            ) from error
        run.folder.note(slurm_job=str(job.job_id))
        return SlurmJob(job, self._queue, since=time.monotonic())


def train_here(folder: str, ranks: int) -> int:
    """Train a run on this host, in a job; returns its exit code. Signals are passed to the ranks."""
    started = Ranks(RunFolder(folder), ranks, {})
    for number in {*SIGNALS, signal.SIGUSR2}:  # the last is submitit's for a job whose time is up
        signal.signal(number, lambda *_: started.stop())
    while (code := started.poll()) is None:
        time.sleep(_LOOK_SECONDS)
    return code
