"""Processes of a run on this host: those that carry a mark in their environment, and how one ended, in words."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

import psutil

from skvr_dist.cluster.launcher import LOCAL_RANK_VARIABLES

SECONDS_TO_END = 30.0
"""Between SIGTERM and SIGKILL; what deepspeed and torchrun leave their ranks, too."""


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


def kill_marked_processes(variable: str, value: str) -> None:
    """End those processes at once, stopped ones too."""
    processes = marked_processes(variable, value)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=SECONDS_TO_END)


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


def in_words(code: int) -> str:
    """An exit code, or the signal that it stands for."""
    if code > 128 and code - 128 in set(signal.Signals):
        return f"{signal.Signals(code - 128).name} ({code})"
    if 256 - code in set(signal.Signals):  # deepspeed passes the negative code of a killed rank on
        return f"a rank's {signal.Signals(256 - code).name} ({code})"
    return f"code {code}"


def say(text: str) -> None:
    """A line of what keeps a run running on the console, which may have gone."""
    with contextlib.suppress(OSError):
        print(f"keep_running: {text}", file=sys.stderr, flush=True)
