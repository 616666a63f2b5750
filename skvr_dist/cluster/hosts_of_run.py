"""A host of a run as its supervisor sees it: how its agent is started, what it says, and when it is lost."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from skvr_dist.cluster.agent import MARK, mark_of
from skvr_dist.cluster.hostfile import read_hostfile
from skvr_dist.cluster.messages import Connection, Message
from skvr_dist.cluster.network import is_loopback
from skvr_dist.errors import UserError

_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=5"]
_PACKAGE = Path(__file__).parents[2]


class HostOfRun:
    """One host.

    Args:
        index: its place among the run's hosts.
        name: that the other hosts know it by.
        slots: ranks on it.
        started_by: `us`, over ssh unless it is the first; `others`, who start its agent too.
    """

    def __init__(self, index: int, name: str, slots: int, *, started_by: str = "us") -> None:
        self.index, self.name, self.slots = index, name, slots
        self._is_ours = started_by == "us" or index == 0
        self._starter: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.why_lost = "it has not joined yet"

    @property
    def is_here(self) -> bool:
        """Whether its agent is connected."""
        return self.connection is not None and not self.connection.closed

    def start_agent(self, run: Path, supervisor: str) -> None:
        """Start its agent, on another host over ssh; nothing is done where others start it.

        Raises:
            UserError: there is no ssh.
        """
        self._end_starter()
        if not self._is_ours:
            return
        path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "skvr_dist.cluster.agent", str(run.resolve())]
        command += [str(self.index), self.name, supervisor]
        command = ["env", f"PYTHONPATH={path}", f"{MARK}={mark_of(run, self.index)}", *command]
        if self.index:
            command = [*_SSH, self.name, f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"]
        try:
            self._starter = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            raise UserError(f"cannot start {command[0]} ({error}), which hosts are reached with; install it") from None

    def starter_code(self) -> int | None:
        """What starting its agent ended with; None while it runs, and where others do it."""
        return None if self._starter is None else self._starter.poll()

    def may_come(self) -> bool:
        """Whether an agent is being started that has not joined."""
        return not self.is_here and self._starter is not None and self._starter.poll() is None

    def join(self, connection: Connection, name: str) -> None:
        """Take its agent's connection; an earlier one is closed."""
        if self.connection is not None:
            self.connection.close()
        self.connection, self.name = connection, self.name or name

    def send(self, kind: str, **content: Any) -> None:
        """Send its agent a message, if it is there."""
        if self.connection is not None:
            self.connection.send(kind, **content)

    def hear(self, patience_seconds: float) -> list[Message]:
        """What its agent has said; loses it if that was nothing for too long."""
        assert self.connection is not None
        messages = self.connection.receive()
        self.connection.beat()
        silent = self.connection.silent_seconds()
        if self.connection.closed:
            self.why_lost = "its agent has ended"
        elif silent > patience_seconds:
            self.why_lost = f"no sign of life for {silent:.0f} s (no power, stopped, or the link is cut)"
            self.connection.close()
        if self.connection.closed:
            self._end_starter()
        return messages

    def let_go(self, code: int) -> None:
        """End its agent, which returns that exit code."""
        self.send("end", code=code)
        if self._starter is not None and self.is_here:
            with suppress(subprocess.TimeoutExpired):
                self._starter.wait(timeout=10)
        self._end_starter()
        if self.connection is not None:
            self.connection.close()

    def _end_starter(self) -> None:
        """End the ssh of a host that cannot be reached; the agent over there ends by itself."""
        if self._starter is not None:
            self._starter.kill()
            self._starter.wait()
            self._starter = None


def hosts_of_file(file: Path) -> list[HostOfRun]:
    """The hosts of a hostfile, of which the first must be this one.

    Raises:
        UserError: the file is wrong, or another host is the first.
    """
    names, slots = read_hostfile(file)
    if not is_this_host(names[0]):
        raise UserError(
            f"{file} names {names[0]} first, which is not this host ({socket.gethostname()}); start it there, or name "
            f"this host first"
        )
    if _means_each_itself(names[0]) and not all(map(_means_each_itself, names)):
        raise UserError(
            f"{file} names {names[0]} first, which the other hosts take for themselves; give the name that they know "
            f"this host by ({socket.gethostname()}?)"
        )
    return [HostOfRun(index, name, slots) for index, name in enumerate(names)]


def _means_each_itself(name: str) -> bool:
    """Whether it is loopback by its spelling; what Debian's /etc/hosts says of a name, other hosts do not see."""
    with suppress(ValueError):
        return is_loopback(name)
    return name == "localhost" or name.startswith("localhost.")


def is_this_host(name: str) -> bool:
    """Whether an address of that name belongs to this host."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
