"""The supervisor of a run on several hosts: a process on the first one that starts the run again when it ends early.

Each host has an agent (`skvr_dist.cluster.agent`), the first one too, that the supervisor starts over ssh or that was
started beside it. An attempt is the ranks of all hosts that are there. When a host is lost, its ranks are named, all
others are killed, since they wait for it, and the next attempt goes without it; lost hosts are tried again before.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from skvr_dist.cluster.hosts_of_run import HostOfRun
from skvr_dist.cluster.interrupt import SIGNALS, on_signals
from skvr_dist.cluster.launcher import HOSTS_VARIABLE, free_port
from skvr_dist.cluster.messages import Connection, Message
from skvr_dist.cluster.network import listen
from skvr_dist.cluster.processes import in_words, say
from skvr_dist.cluster.progress import Progress
from skvr_dist.errors import EXIT_AGAIN, EXIT_USAGE, RunInterrupted, UserError
from skvr_dist.run.folder import RunFolder

SECONDS_TO_SPEAK = 10.0
"""After the latest bad end of a rank, for the others to say whom they miss; then they are killed. Ranks call the roll
for 5 s (`skvr_dist.parallel.failure`)."""
_SECONDS_TO_JOIN = 120.0  # Python on a busy file system; pods that are still being placed
_SECONDS_TO_COME_BACK = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
_LOOK_SECONDS = 0.1


@dataclass
class Attempt:
    """The ranks of one start, and what they ended with."""

    number: int
    hosts: list[HostOfRun]
    ranks: dict[int, HostOfRun]
    codes: dict[int, int] = field(default_factory=dict)
    lost: list[HostOfRun] = field(default_factory=list)
    failed_at: float | None = None
    is_killed: bool = False

    def left(self) -> list[int]:
        """Ranks that have not ended, as far as anybody can tell."""
        return [rank for rank, host in self.ranks.items() if rank not in self.codes and host not in self.lost]

    def code(self) -> int:
        """The exit code of the whole: what a user must put in order comes first, then what nobody foresaw, then 75."""
        own = [code for code in self.codes.values() if 0 < code < 128 and code != EXIT_AGAIN]
        if EXIT_USAGE in own:
            return EXIT_USAGE
        return own[0] if own else EXIT_AGAIN if self.lost or any(self.codes.values()) else 0


class Supervisor:
    """Keeps a run running on its hosts.

    Args:
        command: of a rank.
        output_dir: the run's `train.output_dir`, on a file system that all hosts share.
        hosts: the first is this one.
        restarts: how often to start again without a new checkpoint between.
        patience_seconds: without a sign of life, after which a host is taken for lost.
        overrides: arguments for attempts on fewer hosts, by their number.
        carried: environment variables that every rank gets.

    Raises:
        UserError: another supervisor has this run, or the folder is none.
    """

    def __init__(
        self,
        command: Sequence[str],
        output_dir: Path,
        hosts: Sequence[HostOfRun],
        *,
        restarts: int,
        patience_seconds: float,
        overrides: Mapping[int, Sequence[str]],
        carried: Mapping[str, str],
    ) -> None:
        self._command, self._hosts, self._overrides, self._carried = list(command), list(hosts), overrides, carried
        self._run, self._progress = RunFolder(output_dir), Progress(output_dir)
        self._restarts, self._patience = restarts, patience_seconds
        self._id, self._token = uuid.uuid4().hex, uuid.uuid4().hex
        self._strangers: list[Connection] = []
        self._attempt: Attempt | None = None
        self._stopping = ""
        self._listener = listen()

    def run(self) -> int:
        """Run until the run has finished or must not go on; call it on the main thread.

        Returns:
            the exit code of the last attempt, or 75 after a signal.

        Raises:
            UserError: a host did not join, or another supervisor has this run.
        """
        on_signals(self._note)
        code = EXIT_USAGE
        with self._reachable():
            try:
                self._gather()
                code = self._keep_running()
            except UserError as error:
                code = error.exit_code
                raise
            finally:
                for host in self._hosts:
                    host.let_go(code)
        return code

    def _keep_running(self) -> int:
        left, failures, number = self._restarts, 0, 0
        while True:
            number, before, interruption = number + 1, self._progress.latest(), self._progress.interruption()
            attempt = self._play(number)
            code = attempt.code()
            if code == 0 and self._progress.finished():
                return 0
            self._stopping = self._stopping or self._progress.asked_to_end(interruption) or ""
            saved = self._progress.latest()
            left, failures = (self._restarts, 0) if saved != before else (left - 1, failures + 1)
            at = f"its latest checkpoint is {saved.name}" if saved else "it has no checkpoint yet"
            ended = f"the run ended with {in_words(code)} before its last step; {at}"
            if self._stopping:
                say(f"{ended}; not started again after {self._stopping}")
                return EXIT_AGAIN
            if code == EXIT_USAGE:
                return self._refused(attempt)
            if left < 0:
                say(f"{ended}; given up after {self._restarts + 1} attempts without a new one")
                return code or EXIT_AGAIN
            pause = min(_FIRST_PAUSE_SECONDS * 2 ** max(0, failures - 1), _LONGEST_PAUSE_SECONDS)
            say(f"{ended}; started again in {pause:.0f} s ({left} more without a new one)")
            self._bring_back(pause)
            if self._stopping:
                return EXIT_AGAIN

    def _refused(self, attempt: Attempt) -> int:
        """The exit code when the ranks refuse what they are given: on fewer hosts it may fit again later."""
        missing = [host.name for host in self._hosts if host not in attempt.hosts]
        if not missing:
            return EXIT_USAGE
        say(
            f"the configuration does not fit {len(attempt.hosts)} hosts, without {', '.join(missing)}; start the run "
            f"again when they are back, or give --on-hosts {len(attempt.hosts)} KEY=VALUE a layout that fits"
        )
        return EXIT_AGAIN

    # One attempt

    def _play(self, number: int) -> Attempt:
        attempt = self._attempt = self._start(number)
        is_told = False
        while attempt.left():
            self._look()
            for host in attempt.hosts:
                if not host.is_here and host not in attempt.lost:
                    self._lose(attempt, host)
            if self._stopping and not is_told:
                is_told = True
                say(f"{self._stopping}: the ranks save and end")
                for host in attempt.hosts:
                    host.send("signal", number=int(signal.SIGTERM))
            if attempt.failed_at and time.monotonic() - attempt.failed_at > SECONDS_TO_SPEAK:
                self._kill(attempt, f"still there {SECONDS_TO_SPEAK:.0f} s after the others had ended")
        return attempt

    def _start(self, number: int) -> Attempt:
        """Give the hosts that are there their ranks: on the first host those from 0 on."""
        hosts = [host for host in self._hosts if host.is_here]
        ranks: dict[int, HostOfRun] = {}
        for host in hosts:
            first = len(ranks)
            ranks.update(dict.fromkeys(range(first, first + host.slots), host))
        # A new port each time: a rank that an earlier attempt has left finds nobody where it was to meet the others.
        meeting = {"MASTER_ADDR": self._hosts[0].name, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(ranks))}
        meeting[HOSTS_VARIABLE] = ",".join(host.name for host in hosts)
        names = ", ".join(f"{host.name} ({host.slots})" for host in hosts)
        without = [host.name for host in self._hosts if not host.is_here]
        say(f"attempt {number}: {len(ranks)} ranks on {names}" + (f"; left out: {', '.join(without)}" * bool(without)))
        for host in hosts:
            mine = [rank for rank, its in ranks.items() if its is host]
            host.send(
                "start",
                attempt=number,
                command=[*self._command, *self._overrides.get(len(hosts), [])],
                cwd=str(Path.cwd()),
                environment={**self._carried, **meeting, "LOCAL_WORLD_SIZE": str(host.slots)},
                ranks=mine,
            )
        return Attempt(number, hosts, ranks)

    def _lose(self, attempt: Attempt, host: HostOfRun) -> None:
        attempt.lost.append(host)
        ranks = ", ".join(str(rank) for rank, its in attempt.ranks.items() if its is host)
        say(f"{host.name} is lost, with rank {ranks}: {host.why_lost}")
        self._kill(attempt, "")

    def _kill(self, attempt: Attempt, why: str) -> None:
        if attempt.is_killed:
            return
        attempt.is_killed = True
        if why:
            stuck = ", ".join(f"rank {rank} on {attempt.ranks[rank].name}" for rank in attempt.left())
            say(f"killed: {stuck}, {why}")
        for host in attempt.hosts:
            host.send("kill")

    def _ended(self, host: HostOfRun, message: Message) -> None:
        """Note what a rank ended with."""
        attempt = self._attempt
        if attempt is None or message["attempt"] != attempt.number:
            return
        rank, code = int(message["rank"]), int(message["code"])
        attempt.codes[rank] = code
        if code and not attempt.is_killed:
            attempt.failed_at = time.monotonic()
            if code - 128 in SIGNALS:  # it had not begun to train, or it would have saved
                self._stopping = self._stopping or f"{signal.Signals(code - 128).name} to rank {rank} on {host.name}"
            elif code > 128 and not self._stopping:
                say(f"rank {rank} on {host.name} ended with {in_words(code)}; of SIGKILL look for memory first")

    # Hosts

    def _gather(self) -> None:
        """Start the agents, and wait until all have joined.

        Raises:
            UserError: one could not be started.
            RunInterrupted: one did not come in time.
        """
        for host in self._hosts:
            host.start_agent(self._run.path, self._id)
        deadline = time.monotonic() + _SECONDS_TO_JOIN
        while missing := [host for host in self._hosts if not host.is_here]:
            self._look()
            for host in missing:
                if (code := host.starter_code()) is not None:
                    raise UserError(
                        f"host {host.name} could not be started (code {code}, its reason is above); put it in order, "
                        f"or take it out of the hostfile"
                    )
            if time.monotonic() > deadline or self._stopping:
                names = ", ".join(host.name for host in missing)
                raise RunInterrupted(
                    f"{names} did not join within {_SECONDS_TO_JOIN:.0f} s"
                    if not self._stopping
                    else f"{self._stopping} before {names} had joined"
                )

    def _bring_back(self, pause: float) -> None:
        """Start the agents of hosts that were lost again, and wait a while for them, at least as long as the pause.

        Raises:
            RunInterrupted: this host's own did not come back.
        """
        for host in self._hosts:
            if not host.is_here:
                host.start_agent(self._run.path, self._id)
        self._pause(pause)
        deadline = time.monotonic() + _SECONDS_TO_COME_BACK
        while time.monotonic() < deadline and any(host.may_come() for host in self._hosts):
            self._look()
        if not self._hosts[0].is_here:
            raise RunInterrupted(f"the agent of {self._hosts[0].name} does not start again; start the run again")

    def _pause(self, seconds: float) -> None:
        """Wait, and hear what comes meanwhile; until a signal."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._stopping:
            self._look()

    def _look(self) -> None:
        """Hear what has come, give signs of life, and notice who gives none; takes a moment."""
        here = [host for host in self._hosts if host.is_here]
        connections = [*self._strangers, *(host.connection for host in here if host.connection)]
        files = [self._listener.fileno(), *(connection.fileno() for connection in connections)]
        with suppress(OSError, ValueError):
            ready, _, _ = select.select(files, [], [], _LOOK_SECONDS)
            if self._listener.fileno() in ready:
                self._strangers.append(Connection(self._listener.accept()[0]))
        for stranger in list(self._strangers):
            for message in stranger.receive():
                self._greet(stranger, message)
        self._strangers = [stranger for stranger in self._strangers if not stranger.closed]
        for host in here:
            for message in host.hear(self._patience):
                if message["kind"] == "ended":
                    self._ended(host, message)
                elif message["kind"] == "stop":
                    self._stopping = self._stopping or f"{message['signal']} on {host.name}"

    def _greet(self, stranger: Connection, message: Message) -> None:
        """Let an agent in that knows the token; say who this is to one who asks."""
        if message.get("kind") == "who":
            stranger.send("who", id=self._id)
        elif message.get("kind") == "hello" and message.get("token") == self._token:
            self._strangers.remove(stranger)
            self._hosts[message["index"]].join(stranger, message["host"])
        else:
            stranger.close()

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Write where agents find this supervisor into the run's folder.

        Raises:
            UserError: there is another one, which lives.
        """
        file = self._run.supervisor
        if other := _living_supervisor(file):
            raise UserError(
                f"{self._run.path} is kept running by process {other['process']} on {other['host']}; wait for its end, "
                f"end it, or give another train.output_dir"
            )
        facts = {
            "id": self._id,
            "host": self._hosts[0].name,
            "port": self._listener.getsockname()[1],
            "process": os.getpid(),
            "patience_seconds": self._patience,
            "token": self._token,
        }
        self._run.path.mkdir(parents=True, exist_ok=True)
        _write_for_this_user(file, json.dumps(facts))
        try:
            yield
        finally:
            self._listener.close()
            with suppress(OSError, ValueError, KeyError):
                if json.loads(file.read_bytes())["id"] == self._id:
                    file.unlink()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._stopping = self._stopping or signal.Signals(number).name


def _living_supervisor(file: Path) -> dict[str, Any] | None:
    """What the file says of a supervisor that answers; None if there is none, or it does not.

    Raises:
        UserError: it is another user's, which cannot be asked.
    """
    try:
        text = file.read_bytes()
    except PermissionError:
        raise UserError(
            f"{file} is another user's, whose supervisor may keep this run running; let that user end it and remove "
            f"the file, or give another train.output_dir"
        ) from None
    except OSError:  # there is none
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):  # it has gone, or the file is damaged
        facts: dict[str, Any] = json.loads(text)
        with socket.create_connection((facts["host"], facts["port"]), timeout=5.0) as connected:
            other = Connection(connected)
            other.send("who")
            select.select([connected], [], [], 5.0)
            if any(message.get("id") == facts["id"] for message in other.receive()):
                return facts
    return None


def _write_for_this_user(file: Path, text: str) -> None:
    """Write a file at once that no other user can read."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as written:
        written.write(text)
    partial.replace(file)
