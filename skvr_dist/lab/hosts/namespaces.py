"""One host's worth of namespaces: processes, network, mounts, names and shared memory of its own.

A host is what `unshare` starts: its first process reaps, its processes are nobody else's, and killing the first ends
all of them at once. It ends with the process that made it, however that ends (pdeathsig).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

DIES_WITH_ITS_PARENT = ["setpriv", "--pdeathsig", "KILL"]
_NEW = ["unshare", "--fork", "--kill-child=KILL", "--pid", "--net", "--uts", "--ipc", "--mount", "--mount-proc"]
_FIRST_PROCESS = "echo ready; while :; do wait; sleep 0.2; done"
_NEEDED = ("unshare", "nsenter", "setpriv", "ip", "tc", "ssh", "ssh-keygen", "sshd")
_PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "srun": "slurm-client",
    "sbatch": "slurm-client",
    "munged": "munge",
    "/usr/bin/mpirun": "openmpi-bin",
}
"""Debian's names of the packages of programs, where they are others."""


class Namespaces:
    """A set of namespaces and its first process, until `end`.

    Args:
        log: what the first process says.
    """

    def __init__(self, log: Path) -> None:
        with log.open("w") as said:
            self._holder = subprocess.Popen(
                [*DIES_WITH_ITS_PARENT, *_NEW, "sh", "-c", _FIRST_PROCESS],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces: {log.read_text()}")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.init = int(children[0])
        """Number, on this machine, of the process that is number 1 inside."""

    def entering(self, folder: str = "/") -> list[str]:
        """The words before a command that run it inside, in that folder."""
        return ["nsenter", "-t", str(self.init), "-a", f"--wdns={folder}"]

    def do(self, script: str) -> None:
        """Run a shell script inside.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run([*self.entering(), "sh", "-ec", script], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{script}: {done.stderr}")

    def processes(self) -> dict[int, str]:
        """Command lines of the processes inside, by their numbers on this machine; the first one is not among them."""
        found = {}
        try:
            space = Path(f"/proc/{self.init}/ns/pid").readlink()
        except OSError:  # ended
            return {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int(entry.name) != self.init and (entry / "ns/pid").readlink() == space:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if line:
                        found[int(entry.name)] = line
            except OSError:  # gone meanwhile
                continue
        return found

    def is_up(self) -> bool:
        """Whether the first process lives."""
        return self._holder.poll() is None

    def end(self) -> None:
        """End all processes inside."""
        self._holder.kill()
        self._holder.wait()


def programs_path() -> str:
    """PATH with the folders of the system's services."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def why_not(*programs: str) -> str | None:
    """Why no hosts can be made here, in a sentence; None if they can.

    Args:
        programs: what else has to be installed, such as `pdsh`.
    """
    if sys.platform != "linux":
        return f"hosts are made of Linux's namespaces, and this is {sys.platform}"
    for program in (*_NEEDED, *programs):
        if shutil.which(program, path=programs_path()) is None:
            package = _PACKAGES.get(program, program)
            return f"{program} is not installed, which hosts made of namespaces need (Debian's package {package})"
    trial = [*_NEW, "sh", "-c", "ip link add br0 type bridge && ip link add eth0 type veth peer name port0"]
    done = subprocess.run(trial, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"code {done.returncode}"
        return f"this machine allows no namespaces with networks of their own ({reason}); they need root's rights"
    return None
