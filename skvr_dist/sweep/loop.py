"""The sweep itself: start what is not finished, start again what can be, go on when one fails."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from skvr_dist.checkpoint.folder import candidates
from skvr_dist.cluster.interrupt import on_signals
from skvr_dist.errors import EXIT_AGAIN
from skvr_dist.sweep.places import Job, Machine
from skvr_dist.sweep.plan import PlannedRun
from skvr_dist.sweep.results import Results, note_commit

State = Literal["waiting", "running", "finished", "failed"]
_LOOK_SECONDS = 0.1
_CONSOLE_BYTES = 1 << 16


@dataclass
class Status:
    """Where a run of the sweep is."""

    run: PlannedRun
    state: State
    retries: int
    """How often it may still be started again without a new checkpoint."""
    error: str = ""
    """Why it failed."""
    job: Job | None = None
    saved: Path | None = None
    """Its newest checkpoint when it was last started."""
    told_to_end: bool = False


class Sweep:
    """Runs in a machine until none is left that can begin.

    Args:
        runs: a branch comes after its trunk.
        retries: how often a run that ended with exit code 75 is started again without a new checkpoint between.
        commit: of the code, as `source_commit` gives it.
        show: is called with all of them whenever one may have changed.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        machine: Machine,
        results: Results,
        *,
        retries: int,
        commit: str | None,
        show: Callable[[Sequence[Status]], None],
    ) -> None:
        self.statuses = [Status(run, "finished" if run.is_finished() else "waiting", retries) for run in runs]
        self._machine, self._results, self._show = machine, results, show
        self._retries, self._commit = retries, commit
        self._signal: str | None = None

    def run(self) -> str | None:
        """Run them; call it on the main thread.

        Returns:
            the signal that ended the sweep before it was through, None if it is through.
        """
        on_signals(self._stop)
        self._write_results()
        try:
            while self._step():
                self._show(self.statuses)
                time.sleep(_LOOK_SECONDS)
        finally:  # of a failure of ours: no run is left without a sweep
            self._stop_jobs()
        self._show(self.statuses)
        return self._signal if any(status.state == "waiting" for status in self.statuses) else None

    def _step(self) -> bool:
        """See who has ended and start who can begin; returns whether something is left to wait for."""
        before = [status.state for status in self.statuses]
        for status in self._running():
            code = status.job.poll() if status.job else None
            if code is not None:
                self._settle(status, code)
        for status in self.statuses:
            if status.state == "waiting" and not self._signal:
                self._begin(status)
        if self._signal:  # it may have come while a run was started
            self._stop_jobs()
        if before != [status.state for status in self.statuses] and "running" in before:
            self._write_results()
        return bool(self._running())

    def _begin(self, status: Status) -> None:
        """Start a run if it can begin; a branch whose trunk has ended without its checkpoint never can."""
        run = status.run
        if not run.can_begin():
            trunk = next(other for other in self.statuses if other.run.name == run.trunk_name)
            if trunk.state in ("finished", "failed"):
                reason = "failed" if trunk.state == "failed" else "is finished"
                status.state = "failed"
                status.error = f"{trunk.run.name}, which it branches off, {reason} without {run.trunk}"
        elif len(self._running()) < self._machine.at_once:
            note_commit(run, self._commit)
            status.saved = _newest(run)
            status.job, status.state = self._machine.start(run), "running"

    def _settle(self, status: Status, code: int) -> None:
        """What becomes of a run that has ended."""
        status.job, run = None, status.run
        if run.is_finished():
            status.state = "finished"
            return
        if self._signal:  # it was asked to end, and goes on with the next sweep
            status.state = "waiting"
            return
        status.retries = self._retries if _newest(run) != status.saved else status.retries - 1
        if code == EXIT_AGAIN and status.retries >= 0:
            status.state = "waiting"
            return
        status.state = "failed"
        told = _last_sentence(run.folder.console) or "no sentence"
        status.error = f"exit code {code}: {told} (all of it is in {run.folder.console})"

    def _running(self) -> list[Status]:
        return [status for status in self.statuses if status.state == "running"]

    def _write_results(self) -> None:
        errors = {status.run.name: status.error for status in self.statuses if status.error}
        self._results.write([status.run for status in self.statuses], errors)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def _stop_jobs(self) -> None:
        """Ask the runs to save and end, each once; the loop waits for them."""
        for status in self._running():
            if status.job and not status.told_to_end:
                status.told_to_end = True
                status.job.stop()


def _newest(run: PlannedRun) -> Path | None:
    return next(iter(candidates(run.folder.checkpoints)), None)


def _last_sentence(console: Path) -> str:
    """The last error that a run has printed."""
    if not console.exists():
        return ""
    with console.open("rb") as file:
        file.seek(max(0, console.stat().st_size - _CONSOLE_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")
