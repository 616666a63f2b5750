"""A run on the lab's hosts that `skvr-keep-running` keeps running, and what can be seen of it from outside."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from skvr_dist.checkpoint.folder import Checkpoint, candidates
from skvr_dist.lab.hosts.case import CPU, Ending, Lab, losses, write_hostfile
from skvr_dist.lab.hosts.hosts import ROOT, Hosts
from skvr_dist.run.folder import RunFolder

SHELL = {**CPU, "PYTHONPATH": str(ROOT)}
"""What a user has set on the first host."""
STEPS = 40
FAULT_STEP = 12
"""The step after which a fault comes."""
TIMEOUT_SECONDS = 15.0
"""parallel.timeout_seconds of these runs."""
PATIENCE_SECONDS = 8
# Layouts that any number of hosts can take: replicas only, 12 sequences in micro-batches of 2.
KEYS: dict[str, Any] = {
    "train__steps": STEPS,
    "train__global_batch_size": 12,
    "data__lanes": 12,
    "checkpoint__every_steps": 5,
    "parallel__pipeline": 1,
    "parallel__timeout_seconds": TIMEOUT_SECONDS,
}
BOUND = 1e-5
"""Relative difference of a loss after other numbers of replicas, which add gradients up in another order."""
_LOOK_SECONDS = 0.1
_LONGEST_SECONDS = 240.0


class KeptRun:
    """A run of a rank per host, started on the first host.

    Args:
        name: of the run's folder.
        hosts: with power.
        keys: of the configuration, beside `KEYS`.
        stand_in: a script that plays a rank, given the run's folder; None trains.
        started_by: `user` on the first host; `batch`, on every one; or `srun`, with a task on every one.
    """

    def __init__(
        self,
        lab: Lab,
        hosts: Hosts,
        name: str,
        keys: Mapping[str, Any] | None = None,
        *,
        stand_in: Path | None = None,
        started_by: Literal["user", "batch", "srun"] = "user",
    ) -> None:
        self.hosts, self.folder = hosts, lab.run_folder(name)
        self._keys, self._started_by = {**KEYS, **(keys or {})}, started_by
        self._rank = ["launch/pretrain.py", *lab.arguments(self.folder, **self._keys)] if stand_in is None else []
        if stand_in is not None:
            self._rank = [str(stand_in), str(self.folder)]
        self._hostfile = write_hostfile(hosts)
        self._zero, self._read = time.monotonic(), 0
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.start()

    def command(self) -> list[str]:
        """What a user types on the first host, or a batch system starts on each."""
        keep = ["--hostfile", str(self._hostfile)] if self._started_by == "user" else ["--ranks", "1"]
        keep += ["--output-dir", str(self.folder), "--patience", str(PATIENCE_SECONDS)]
        srun = ["srun", f"-N{self.hosts.number}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--unbuffered"]
        return [
            *(srun if self._started_by == "srun" else []),
            "python",
            "launch/keep_running.py",
            *keep,
            "--",
            *self._rank,
        ]

    def start(self) -> None:
        """Start it; also again."""
        self._read = len(self._whole())
        for host in self.hosts.all if self._started_by == "batch" else [1]:
            announced = {"RANK": str(host - 1), "LOCAL_RANK": "0", "WORLD_SIZE": str(self.hosts.number)}
            announced |= {"MASTER_ADDR": "host1", "MASTER_PORT": "29500"}
            env = {**SHELL, **(announced if self._started_by == "batch" else {})}
            self.processes[host] = self.hosts.start(host, self.command(), log=self._log(host), env=env)
        self.process = self.processes[1]

    # What is seen

    def console(self) -> str:
        """What was said since the start, or since the fault."""
        return self._whole()[self._read :]

    def mark(self) -> None:
        """The fault comes now: seconds are counted from here."""
        self._read, self._zero = len(self._whole()), time.monotonic()

    def wait_for_step(self, step: int) -> None:
        """Until the console has told of a step.

        Raises:
            RuntimeError: the run has ended, or it takes too long.
        """
        self.seconds_until(lambda: max(_steps(self.console()), default=0) >= step, f"step {step}", must=True)

    def seconds_until_said(self, pattern: str) -> float | None:
        """Seconds from the fault until the console says what matches; None if it never does."""
        return self.seconds_until(lambda: re.search(pattern, self.console()) is not None, pattern)

    def seconds_until_trained(self) -> float | None:
        """Seconds from the fault until a step of another attempt is done; None if there is none."""
        return self.seconds_until(lambda: bool(_steps(self.console().partition("attempt ")[2])), "a step")

    def seconds_until(self, holds: Callable[[], bool], what: str, *, must: bool = False) -> float | None:
        """Seconds from the fault until that holds; None if the run ends before, or after minutes."""
        deadline = time.monotonic() + _LONGEST_SECONDS
        while True:
            ended = self.process.poll() is not None
            if holds():
                return time.monotonic() - self._zero
            if ended or time.monotonic() > deadline:
                if must:
                    raise RuntimeError(f"never came to {what}, code {self.process.poll()}: {self.console()[-3000:]}")
                return None
            time.sleep(_LOOK_SECONDS)

    def code(self) -> int | None:
        """The exit code; None if it does not end."""
        try:
            return self.process.wait(timeout=_LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            return None

    def seconds_until_quiet(self, *hosts: int, limit: float = 60.0) -> float | None:
        """Seconds from the fault until nothing of the run is left on these hosts; None if something stays."""
        deadline = time.monotonic() + limit
        names = tuple(f"host{host}:" for host in hosts)
        while any(line.startswith(names) for line in self.hosts.left_over()):
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_SECONDS)
        return time.monotonic() - self._zero

    def has_step(self, step: int) -> bool:
        """Whether a step is done, whatever the console says."""
        return max(losses(self.folder), default=0) >= step

    def rank_processes(self, host: int) -> list[int]:
        """Processes of the ranks of a host, without those that read for them."""
        found = self.hosts.ranks(host)
        return [pid for pid in found if _parent(pid) not in found]

    def kill(self, host: int, number: int, *containing: str) -> None:
        """Send a signal to the processes of a host in whose line one of these texts is found."""
        for pid, line in self.hosts.processes(host).items():
            if any(text in line for text in containing):
                os.kill(pid, number)

    # What must hold

    def expect_finished(self, lab: Lab, ending: Ending, *, same_ranks: bool = True) -> None:
        """The run came to its end by itself, and its losses are those of an undisturbed one."""
        self.expect_ended(ending)
        expected = lab.reference(self.hosts.number, **self._keys)
        self.expect_losses(expected, ending, bound=0.0 if same_ranks else BOUND)

    def expect_ended(self, ending: Ending) -> None:
        """The run came to its end by itself, and nothing of it is left."""
        code = self.code()
        ending.expect(code == 0, f"code {code}: {self.console()[-1500:]}")
        ending.expect(not self.hosts.left_over(), f"left running: {self.hosts.left_over()}")

    def expect_losses(self, expected: Mapping[int, float], ending: Ending, *, bound: float) -> None:
        """Losses of all steps are those of another run.

        Args:
            expected: by step.
            bound: of the largest relative difference; on as many ranks it is 0.
        """
        found = losses(self.folder)
        missing = [step for step in expected if step not in found]
        ending.expect(not missing, f"no losses of steps {missing}")
        both = [step for step in expected if step in found]
        worst = max((abs(found[step] - expected[step]) / expected[step] for step in both), default=0.0)
        ending.expect(worst <= bound, f"largest relative difference of a loss is {worst:.1e}")

    def undisturbed(self, lab: Lab) -> dict[int, float]:
        """Losses by step of a run on this machine that nothing disturbs, with as many ranks for each step as this one
        had: it goes on from its own checkpoint where this one did. This one has kept all of its checkpoints."""
        saved = sorted(candidates(RunFolder(self.folder).checkpoints))
        ranks = {path: Checkpoint(path).facts.layout.replicas for path in saved}  # type: ignore[union-attr]
        folder, resume = lab.run_folder("undisturbed"), "auto"
        for count, of_it in itertools.groupby(saved, key=ranks.__getitem__):
            last = RunFolder(folder).checkpoints / list(of_it)[-1].name
            words = lab.arguments(folder, **{**self._keys, "train__resume": resume})
            lab.train_here(count, "launch/pretrain.py", *words, until=last)
            resume = str(last)
        return losses(folder)

    def console_of(self, host: int) -> str:
        """All that was said on a host."""
        return self._log(host).read_text(errors="replace") if self._log(host).exists() else ""

    def _whole(self) -> str:
        return self.console_of(1)

    def _log(self, host: int) -> Path:
        return self.hosts.folder / f"console-{host}.txt"


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return 0


def _steps(console: str) -> list[int]:
    return [int(step) for step in re.findall(r"step +(\d+)/\d+  loss", console)]
