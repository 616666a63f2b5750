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
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
import yaml

from skvr_dist.checkpoint.folder import candidates, step_folder
from skvr_dist.cluster.launcher import LOCAL_RANK_VARIABLES
from skvr_dist.errors import EXIT_AGAIN, EXIT_USAGE, UserError
from skvr_dist.run.folder import RunFolder

_MARK = "SKVR_KEPT_RUNNING_BY"
SECONDS_TO_END = 30.0
"""Between SIGTERM and SIGKILL; what deepspeed and torchrun leave their ranks, too."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
        self._run = RunFolder(output_dir)
        if self._run.path.exists() and not self._run.path.is_dir():
            raise UserError(f"{self._run.path} is not a folder; give the run's train.output_dir as --output-dir")
        self._restarts = restarts
        self._mark = uuid.uuid4().hex
        self._stopping: str | None = None

    def run(self) -> int:
        """Run the command until the run has finished; call it on the main thread.

        Returns:
            the exit code of the last attempt, or 75 after a signal: torchrun has 1 for everything.
        """
        for number in _SIGNALS:
            signal.signal(number, self._pass_on)
        left = self._restarts
        while True:
            before = self._latest()
            code = self._attempt()
            if code == EXIT_USAGE or (code == 0 and self._finished()):
                return code
            saved = self._latest()
            left = self._restarts if saved != before else left - 1
            at = f"its latest checkpoint is {saved.name}" if saved else "it has no checkpoint yet"
            ended = f"the run ended with {_in_words(code)} before its last step; {at}"
            if self._stopping:
                _say(f"{ended}; not started again after {self._stopping}")
                return EXIT_AGAIN
            if left < 0:
                _say(f"{ended}; given up after {self._restarts + 1} attempts without a new one")
                return code or EXIT_AGAIN
            _say(f"{ended}; started again ({left} more without a new one)")

    def _attempt(self) -> int:
        environment = {**os.environ, _MARK: self._mark}
        try:
            # Apart from the terminal's process group, so that Ctrl+C comes here only, and is passed on.
            launcher = subprocess.Popen(self._command, env=environment, start_new_session=True)
        except OSError as error:
            raise UserError(
                f"cannot start {self._command[0]} ({error}); give the launcher's command after --"
            ) from None
        code = launcher.wait()
        # Ranks without a launcher would write to the same folder as the next attempt.
        end_marked_processes(_MARK, self._mark)
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Ask the ranks of this host to save and end; before they exist, end the launcher."""
        self._stopping = signal.Signals(number).name
        processes = marked_processes(_MARK, self._mark)
        for process in ranks_among(processes) or processes:
            process.terminate()

    def _latest(self) -> Path | None:
        """The run's newest finished checkpoint."""
        return next(iter(candidates(self._run.checkpoints)), None)

    def _finished(self) -> bool:
        """Whether the checkpoint of the run's last step is there."""
        config = self._run.config
        if not config.exists():
            raise UserError(
                f"the command ended well, but {config} is not there; give its train.output_dir as --output-dir"
            )
        try:
            steps = int(yaml.safe_load(config.read_bytes())["train"]["steps"])
        except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{config} names no train.steps ({reason}); remove it, the run writes it anew") from None
        latest = self._latest()
        return latest is not None and latest.name == step_folder(steps)


def marked_processes(variable: str, value: str) -> list[psutil.Process]:
    """This user's processes with that environment variable, whatever their parents, but not this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):  # another user's, or gone
            continue
    return found


def end_marked_processes(variable: str, value: str) -> int:
    """End those processes, with SIGKILL where SIGTERM does not in time; returns how many there were."""
    processes = marked_processes(variable, value)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_END)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive)
    return len(processes)


def ranks_among(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The processes that a launcher among them started as ranks, without those that ranks have started."""
    launchers, ranks = set(), []
    for process in processes:
        try:
            if any(name in process.environ() for name in LOCAL_RANK_VARIABLES):
                ranks.append((process, process.ppid()))
            else:
                launchers.add(process.pid)
        except (psutil.Error, OSError):  # gone; its own children are not to be taken for ranks
            continue
    return [process for process, parent in ranks if parent in launchers]


def _in_words(code: int) -> str:
    if code > 128 and code - 128 in set(signal.Signals):
        return f"{signal.Signals(code - 128).name} ({code})"
    if 256 - code in set(signal.Signals):  # deepspeed passes the negative code of a killed rank on
        return f"a rank's {signal.Signals(256 - code).name} ({code})"
    return f"code {code}"


def _say(text: str) -> None:
    print(f"keep_running: {text}", file=sys.stderr, flush=True)
