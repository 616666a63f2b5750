"""Start a run again when it ends before its last step, as long as it makes progress.

What the launchers do by themselves, as run (deepspeed 0.19.8, torch 2.13): `deepspeed` on one node dies of a SIGTERM
or SIGUSR1 and leaves its ranks running; its inner launcher and torchrun pass SIGTERM on, kill after 30 s and return 1;
torchrun dies of a SIGUSR1; and `deepspeed` returns 0 when its inner launcher was killed. So signals go straight to the
ranks here, a run has finished only when its last step is saved, and what an attempt leaves behind is ended before the
next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from skvr_dist.cluster.interrupt import SIGNALS, on_signals
from skvr_dist.cluster.processes import end_marked_processes, in_words, marked_processes, ranks_among, say
from skvr_dist.cluster.progress import Progress
from skvr_dist.errors import EXIT_AGAIN, EXIT_USAGE, UserError

_MARK = "SKVR_KEPT_RUNNING_BY"


class KeptRun:
    """A command that is started until its run has finished.

    Args:
        command: a launcher and its arguments.
        output_dir: the run's `train.output_dir`, in which its progress is seen.
        restarts: how often to start again without a new checkpoint between.

    Raises:
        UserError: the command cannot be started, or the run's folder is none.
    """

    def __init__(self, command: Sequence[str], output_dir: Path, restarts: int) -> None:
        self._command = list(command)
        self._progress = Progress(output_dir)
        self._restarts = restarts
        self._mark = uuid.uuid4().hex
        self._stopping: str | None = None

    def run(self) -> int:
        """Run the command until the run has finished; call it on the main thread.

        Returns:
            the exit code of the last attempt, or 75 after a signal: torchrun has 1 for everything.
        """
        on_signals(self._pass_on)
        left = self._restarts
        while True:
            before = self._progress.latest()
            code = self._attempt()
            if code == EXIT_USAGE or (code == 0 and self._progress.finished()):
                return code
            saved = self._progress.latest()
            left = self._restarts if saved != before else left - 1
            at = f"its latest checkpoint is {saved.name}" if saved else "it has no checkpoint yet"
            ended = f"the run ended with {in_words(code)} before its last step; {at}"
            if self._stopping:
                say(f"{ended}; not started again after {self._stopping}")
                return EXIT_AGAIN
            if left < 0:
                say(f"{ended}; given up after {self._restarts + 1} attempts without a new one")
                return code or EXIT_AGAIN
            say(f"{ended}; started again ({left} more without a new one)")

    def _attempt(self) -> int:
        environment, interruption = {**os.environ, _MARK: self._mark}, self._progress.interruption()
        try:
            # Apart from the terminal's process group, so that Ctrl+C comes here only, and is passed on.
            launcher = subprocess.Popen(self._command, env=environment, start_new_session=True)
        except OSError as error:
            raise UserError(
                f"cannot start {self._command[0]} ({error}); give the launcher's command after --"
            ) from None
        if self._stopping:  # a signal has come since it was last asked for, when there was nobody to pass it on to
            self._ask_to_end()
        code = launcher.wait()
        self._stopping = self._stopping or self._asked_of_others(code, interruption)
        # Ranks without a launcher would write to the same folder as the next attempt.
        end_marked_processes(_MARK, self._mark)
        return code if code >= 0 else 128 - code

    def _asked_of_others(self, code: int, before: dict[str, Any] | None) -> str | None:
        """The signal that asked the launcher or a rank to end, in words, if one did.

        Args:
            code: of the launcher.
            before: the interruption that was noted before the attempt.
        """
        if -code in SIGNALS:
            return f"{signal.Signals(-code).name} to {self._command[0]}"
        return self._progress.asked_to_end(before)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._stopping = signal.Signals(number).name
        self._ask_to_end()

    def _ask_to_end(self) -> None:
        """Ask the ranks of this host to save and end; before they exist, end the launcher."""
        processes = marked_processes(_MARK, self._mark)
        for process in ranks_among(processes) or processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since, perhaps by an earlier signal
                process.terminate()
