"""The agent of a run on one host: starts the ranks that the supervisor asks for, and never outlives it by much.

    python -m skvr_dist.cluster.agent RUN_FOLDER INDEX HOST SUPERVISOR

It imports no torch, so that it is there within moments. It tells the supervisor what each rank ended with, and signals
that it has received itself. When the supervisor has gone, or cannot be reached for as long as its patience lasts, the
agent kills its ranks and ends with code 75. When the agent is killed, the system kills its ranks (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from skvr_dist.cluster.interrupt import on_signals
from skvr_dist.cluster.launcher import is_of_a_launcher
from skvr_dist.cluster.messages import Connection, Message
from skvr_dist.cluster.processes import kill_marked_processes, say
from skvr_dist.errors import EXIT_AGAIN, EXIT_USAGE, RunInterrupted, UserError
from skvr_dist.run.folder import RunFolder

MARK = "SKVR_AGENT"
"""Variable in the environment of an agent that the supervisor starts, and of every rank: `mark_of` their host."""
_LOOK_SECONDS = 0.1
_SECONDS_TO_DIE = 5.0
# The supervisor that starts an agent is there before it, but NFS shows a host what it has seen for up to a minute.
_SECONDS_TO_FIND = 90.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Agent:
    """The ranks of one host.

    Args:
        folder: of the run, which the supervisor's address is read from.
        index: this host's place among the run's hosts.
        host: its name.
        supervisor: the id of the one to look for; empty takes any.
        seconds: to look for it.

    Raises:
        RunInterrupted: there was none in that time.
    """

    def __init__(self, folder: RunFolder, index: int, host: str, supervisor: str = "", seconds: float = 60.0) -> None:
        self._host, self._asked_to_stop = host, ""
        self._ranks: dict[int, subprocess.Popen[bytes]] = {}
        self._attempt = 0
        # One agent per run and host: an earlier one, stopped perhaps, and what it has left end now.
        self._mark = mark_of(folder.path, index)
        kill_marked_processes(MARK, self._mark)
        on_signals(self._note)
        self._supervisor, facts = _connect(folder, supervisor, seconds)
        self._patience, self._supervised_by = facts["patience_seconds"], facts["host"]
        self._supervisor.send("hello", token=facts["token"], index=index, host=host)

    def run(self) -> int:
        """Do as the supervisor says until it lets this agent go; returns the exit code that it names."""
        while True:
            with contextlib.suppress(OSError, ValueError):
                select.select([self._supervisor], [], [], _LOOK_SECONDS)
            for message in self._supervisor.receive():
                if message["kind"] == "start":
                    self._start(message)
                elif message["kind"] == "signal":
                    for rank in self._ranks.values():
                        rank.send_signal(message["number"])
                elif message["kind"] == "kill":
                    self._kill()
                elif message["kind"] == "end":
                    self._kill()
                    return int(message["code"])
            self._report()
            self._supervisor.beat()
            if self._supervisor.closed or self._supervisor.silent_seconds() > self._patience:
                return self._alone()

    def _start(self, message: Message) -> None:
        self._attempt = message["attempt"]
        own = {name: value for name, value in os.environ.items() if not is_of_a_launcher(name)}
        environment = {**own, **message["environment"], MARK: self._mark}
        for local, rank in enumerate(message["ranks"]):
            announced = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            try:
                self._ranks[rank] = subprocess.Popen(
                    message["command"],
                    env={**environment, **announced},
                    cwd=message["cwd"],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # the rank and what it starts are killed as one; Ctrl-C comes here alone
                    preexec_fn=_die_with(os.getpid()),
                )
            except OSError as error:
                say(f"cannot start rank {rank} on {self._host} in {message['cwd']} ({error})")
                self._supervisor.send("ended", attempt=self._attempt, rank=rank, code=EXIT_USAGE)

    def _report(self) -> None:
        """Tell what ranks have ended with, and that this agent was asked to end."""
        for rank, process in list(self._ranks.items()):
            code = process.poll()
            if code is not None:
                del self._ranks[rank]
                _kill_group(process.pid)  # what the rank had started
                self._supervisor.send("ended", attempt=self._attempt, rank=rank, code=code if code >= 0 else 128 - code)
        if self._asked_to_stop:
            self._supervisor.send("stop", signal=self._asked_to_stop)
            self._asked_to_stop = ""

    def _alone(self) -> int:
        silent = "has gone" if self._supervisor.closed else f"gave no sign of life for {self._patience:.0f} s"
        ranks = ", ".join(map(str, sorted(self._ranks)))
        ended = f"; rank {ranks} on this host ended with it" if ranks else ""
        self._kill()
        say(f"{self._host}: the supervisor on {self._supervised_by} {silent}{ended}; start the run again")
        return EXIT_AGAIN

    def _kill(self) -> None:
        """SIGKILL, which ends a stopped rank too, and comes after the ranks have had their time."""
        for rank in self._ranks.values():
            _kill_group(rank.pid)
        for rank in self._ranks.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # it waits for a disk that does not answer
                rank.wait(timeout=_SECONDS_TO_DIE)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked_to_stop = signal.Signals(number).name


def _connect(folder: RunFolder, supervisor: str, seconds: float) -> tuple[Connection, dict[str, Any]]:
    """A connection to the supervisor that the run's folder names, and what is written there about it."""
    deadline, why = time.monotonic() + seconds, "it is not there"
    while True:
        where = ""
        try:
            facts = json.loads(folder.supervisor.read_bytes())
            if supervisor in ("", facts["id"]):
                where = f"{facts['host']}, port {facts['port']}: "
                connected = socket.create_connection((facts["host"], facts["port"]), timeout=5.0)
                return Connection(connected), facts
            why = "it is of another supervisor"
        except FileNotFoundError:
            pass
        except OSError as error:  # nobody is there; or the file is another user's
            why = f"{where}{error.strerror or error}"
        except (ValueError, KeyError, TypeError, OverflowError):
            why = "it is damaged"
        is_orphan = supervisor and os.getppid() == 1  # the supervisor has given up, and ended the ssh
        if is_orphan or time.monotonic() > deadline:
            raise RunInterrupted(
                f"host {socket.gethostname()} found no supervisor in {folder.supervisor} within {seconds:.0f} s "
                f"({why}); give an --output-dir that all hosts share, and start the first host"
            )
        time.sleep(_LOOK_SECONDS)


def mark_of(run: Path, index: int) -> str:
    """What the processes of a run on its host of that number are marked with."""
    return f"{run.resolve()} {index}"


def _die_with(parent: int) -> Callable[[], None]:
    """Run in a child: the system kills it when `parent` ends, however that ends."""

    def request() -> None:
        if _libc is not None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_AGAIN)

    return request


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Entry point of what the supervisor starts on each host; returns the exit code."""
    folder, index, host, supervisor = words
    try:
        return Agent(RunFolder(Path(folder)), int(index), host, supervisor, _SECONDS_TO_FIND).run()
    except UserError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
