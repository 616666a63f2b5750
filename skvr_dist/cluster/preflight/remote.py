"""A probe on another host: started over ssh or by Slurm, asked in lines of JSON, gone when this process is."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skvr_dist.cluster.preflight.probe import MARK
from skvr_dist.errors import UserError

_SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5"]
_SRUN = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--unbuffered"]
_PROBE = ["-u", "-m", "skvr_dist.cluster.preflight.probe"]
# What ssh, a shell or Python say, and the sentence that it makes; in the order of looking.
_SENTENCES = {
    "Host key verification failed": "its key is not known to ssh here; accept it once: ssh {host} true",
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "it has another key than ssh knows; if it was set up anew: ssh-keygen -R "
    "{host}",
    "Permission denied": "ssh lets nobody in without a password; put your public key there: ssh-copy-id {host}",
    "Could not resolve hostname": "there is no host of that name; correct it in the hostfile, or name it in /etc/hosts",
    "Invalid node name": "Slurm knows no host of that name; correct it in the hostfile",
    "Connection timed out": "it does not answer ssh; is it up, and in this network?",
    "No route to host": "it does not answer ssh; is it up, and in this network?",
    "Connection refused": "it runs no ssh server, or at another port",
    "No module named": "its environment lacks this project or a package ({said}); install the same environment there, "
    "at the same path",
    "No such file or directory": "it lacks a folder or program that is here ({said}); install the same environment and "
    "code there, at the same path, or share them",
    "not found": "it lacks a program that is here ({said}); install the same environment there, at the same path",
}


class Unreachable(Exception):
    """A host whose probe does not answer; the message is a sentence about it, without its name."""


class Remote:
    """The probe of one host.

    Args:
        host: its name.
        variables: what it gets beside what a login there sets.
        over: `ssh`, or `srun` in an allocation of Slurm.
    """

    def __init__(self, host: str, variables: Mapping[str, str], over: str) -> None:
        self.host = host
        here = Path.cwd()
        paths = os.pathsep.join([str(here), *filter(None, [variables.get("PYTHONPATH")])])
        words = ["env", *(f"{name}={value}" for name, value in {**variables, "PYTHONPATH": paths}.items())]
        words += [sys.executable, *_PROBE]
        command = [*_SRUN, f"--nodelist={host}", *words]
        if over == "ssh":
            command = [*_SSH, host, f"cd {shlex.quote(str(here))} && exec {shlex.join(words)}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def ask(self, do: str, seconds: float, **options: Any) -> dict[str, Any]:
        """Ask the probe.

        Raises:
            Unreachable: it has ended, or does not answer in time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        started = time.monotonic()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": do, **options}) + "\n")
                self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        finally:
            late.cancel()
        self._process.wait()
        self._reader.join(5)
        if time.monotonic() - started >= seconds:
            raise Unreachable(f"it gave no answer within {seconds:.0f} s")
        raise Unreachable(self._why())

    def end(self) -> None:
        """End the probe, by the end of what it is asked; what carries it is killed if it does not end by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._said += [line.strip() for line in self._process.stderr if line.strip()]

    def _why(self) -> str:
        for sign, sentence in _SENTENCES.items():
            if said := next((line for line in self._said if sign in line), None):
                return sentence.format(host=self.host, said=said[:200])
        said = self._said[-1][:300] if self._said else "it said nothing"
        return f"its probe ended with code {self._process.returncode} ({said}); try it by hand: ssh {self.host}"


class Remotes:
    """The probes of several hosts, from entering to leaving the context.

    Raises:
        UserError: ssh or srun is not installed here.
    """

    def __init__(self, hosts: Sequence[str], variables: Mapping[str, str], over: str) -> None:
        try:
            self.all = [Remote(host, variables, over) for host in hosts]
        except FileNotFoundError:
            raise UserError(f"{over} is not installed here, which reaches the hosts; install it") from None
        self._pool = ThreadPoolExecutor(len(hosts))

    def ask_all(
        self, do: str, seconds: float, each: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[dict[str, Any] | Unreachable]:
        """Ask all at once; in their order what each answers, or why it does not.

        Args:
            each: options of each host, beside those of all.
        """

        def ask(number: int) -> dict[str, Any] | Unreachable:
            try:
                return self.all[number].ask(do, seconds, **options, **(each[number] if each else {}))
            except Unreachable as reason:
                return reason

        return list(self._pool.map(ask, range(len(self.all))))

    def __enter__(self) -> Remotes:
        return self

    def __exit__(self, *_: object) -> None:
        list(self._pool.map(Remote.end, self.all))
        self._pool.shutdown()
