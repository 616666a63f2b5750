"""Several hosts joined by a switch, each with an address, a name and an sshd, and what can happen to them.

    with Hosts(2, folder) as hosts:
        hosts.run(1, ["ssh", "host2", "hostname"])

All see this machine's files, apart from what is made private. This machine's own network is not touched. Needs root,
and Debian's packages iproute2 and openssh-server; pdsh where a launcher uses it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skvr_dist.lab.hosts.namespaces import DIES_WITH_ITS_PARENT, Namespaces, programs_path

NETWORK = "192.168.77"
"""Above 127.0.0.0/8: in gloo the rank with the larger address connects to the other one. In a network below, a first
host that takes itself for 127.0.1.1 would do so, and nobody would notice that it cannot be reached there."""
ROOT = Path(__file__).parents[3]
"""Of this checkout, which is what hosts run."""
_HOME = pwd.getpwuid(os.getuid()).pw_dir  # as sshd looks it up
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SECONDS_TO_START = 10.0


@dataclass(frozen=True)
class Setup:
    """How hosts differ from those on which everything is right."""

    private: Sequence[str] = ()
    """Folders of which every host has its own, as if they were on its own disk; empty at first."""
    debian_names: bool = False
    """/etc/hosts names the host itself 127.0.1.1, as Debian's installer does."""
    docker0: str | None = None
    """Every host has this address on an interface of its own, as docker's bridge is, which `hostname -I` may name."""
    knows_hosts: bool = True
    """Whether ssh accepts the keys of hosts that it meets for the first time."""
    relayed: Sequence[int] = ()
    """Hosts whose cable is a relay, which can delay and drop (`Hosts.delay`)."""
    login: Mapping[str, str] = field(default_factory=dict)
    """Variables that every login sets, as a profile would."""
    login_of: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """The same, of one host."""


class Hosts:
    """host1 (192.168.77.1), host2, ... from entering to leaving the context.

    Args:
        number: how many.
        folder: new; for keys, logs and what each host has of its own.
        setup: how they differ from the plainest.
    """

    def __init__(self, number: int, folder: Path, setup: Setup | None = None) -> None:
        self.number, self.folder, self.setup = number, Path(folder), setup or Setup()
        self.names = [f"host{host}" for host in self.all]
        self._switch: Namespaces | None = None
        self._spaces: dict[int, Namespaces] = {}
        self._relays: dict[int, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def all(self) -> range:
        """Numbers of the hosts, from 1 on."""
        return range(1, self.number + 1)

    # From power on to power off

    def __enter__(self) -> Hosts:
        self.folder.mkdir(parents=True)
        self.folder.chmod(0o755)
        Path(_HOME, ".ssh").mkdir(exist_ok=True)  # a place to mount on
        for key in ("user", "server"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        try:
            self._switch = Namespaces(self.folder / "switch.log")
            self._switch.do("ip link set lo up; ip link add br0 type bridge; ip link set br0 up")
            for host in self.all:
                self.power_on(host)
            self._wait_for_ssh()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces.values():
            space.end()
        for process in [*self._started, *self._relays.values()]:
            process.kill()
            process.wait()
        if self._switch is not None:
            self._switch.end()

    def power_on(self, host: int) -> None:
        """Start a host; also again, after `power_off`."""
        own = self.folder / f"host{host}"
        self._write_files(host, own)
        space = self._spaces[host] = Namespaces(self.folder / f"host{host}.log")
        if self.setup.docker0:  # before eth0, so that `hostname -I` names it first
            space.do(f"""
                ip link add docker0 type bridge; ip addr add {self.setup.docker0}/16 dev docker0
                ip link set docker0 up
            """)
        self._plug_in(host)
        private = [
            f"mkdir -p {own}/private{path} {path}; mount --bind {own}/private{path} {path}"
            for path in map(shlex.quote, self.setup.private)
        ]
        profiles = [f"{_HOME}/{name}" for name in (".bashrc", ".profile")]
        private += [f"[ ! -e {file} ] || mount --bind /dev/null {file}" for file in profiles]
        space.do(f"""
            hostname host{host}
            mount --bind {own}/hosts /etc/hosts; mount --bind {own}/hostname /etc/hostname
            mount --bind {own}/ssh {_HOME}/.ssh
            mount -t tmpfs none /run; mkdir -p /run/sshd /run/munge /run/lock; mount -t tmpfs none /dev/shm
            {"; ".join(private)}
            ip link set lo up; ip link set eth0 address 02:00:00:00:00:{host:02x}
            ip addr add {NETWORK}.{host}/24 dev eth0; ip link set eth0 up
        """)
        self._run_sshd(host)

    def power_off(self, host: int) -> None:
        """No packet leaves any more, then everything on it is gone: nobody gets a FIN."""
        self.link(host, up=False)
        self._spaces[host].end()

    def kill_all(self, host: int) -> None:
        """Everything on it dies at once while its kernel lives: peers get a RST or a FIN. sshd is started again."""
        for pid in self.processes(host):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._run_sshd(host)

    def _run_sshd(self, host: int) -> None:
        file = self.folder / f"host{host}" / "sshd_config"
        sshd = shutil.which("sshd", path=programs_path())
        self.start(host, [str(sshd), "-D", "-e", "-f", str(file)], log=self.folder / f"sshd{host}.log", env={})

    def _write_files(self, host: int, own: Path) -> None:
        """What a host has of its own: names, keys, settings of ssh and sshd."""
        (own / "ssh").mkdir(parents=True, exist_ok=True)
        (own / "ssh").chmod(0o700)
        lines = ["127.0.0.1 localhost"]
        if self.setup.debian_names:
            lines.append(f"127.0.1.1 host{host}")
        lines += [f"{NETWORK}.{n} host{n}" for n in self.all if not (self.setup.debian_names and n == host)]
        (own / "hosts").write_text("\n".join(lines) + "\n")
        (own / "hostname").write_text(f"host{host}\n")
        login = {**self._login(host), "SKVR_LAB_HOST": str(host)}  # at least one: sshd takes no empty list
        settings = [
            f"HostKey {self.folder}/server",
            f"AuthorizedKeysFile {self.folder}/user.pub",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PidFile none",
            "MaxStartups 100",
            "SetEnv " + " ".join(f"{name}={value}" for name, value in login.items()),
        ]
        (own / "sshd_config").write_text("\n".join(settings) + "\n")
        shutil.copy(self.folder / "user", own / "ssh" / "id_ed25519")
        if self.setup.knows_hosts:
            (own / "ssh" / "config").write_text("Host *\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n")

    def _login(self, host: int) -> dict[str, str]:
        return {**self.setup.login, **self.setup.login_of.get(host, {})}

    def _plug_in(self, host: int) -> None:
        """Connect a host with the switch: a pair of virtual interfaces, or a relay."""
        assert self._switch is not None
        init, port = self._spaces[host].init, f"port{host}"
        with contextlib.suppress(RuntimeError):  # of a host that was powered off before
            self._switch.do(f"ip link del {port} 2> /dev/null")
        if host not in self.setup.relayed:
            link = ["ip", "link", "add", "name", port, "netns", str(self._switch.init)]
            subprocess.run([*link, "type", "veth", "peer", "name", "eth0", "netns", str(init)], check=True)
            self._switch.do(f"ip link set {port} master br0; ip link set {port} up")
        else:
            self._connect_relay(host, port)

    def _connect_relay(self, host: int, port: str) -> None:
        assert self._switch is not None
        init = self._spaces[host].init
        if host in self._relays:
            self._relays.pop(host).kill()
        self.delay(host, 0)
        command = [sys.executable, str(Path(__file__).with_name("relay.py")), str(init), str(self._switch.init), port]
        self._relays[host] = subprocess.Popen([*DIES_WITH_ITS_PARENT, *command, str(self._control(host))])
        deadline = time.monotonic() + _SECONDS_TO_START
        while True:
            try:
                self._spaces[host].do("ip link show eth0")
                self._switch.do(f"ip link set {port} master br0; ip link set {port} up")
                break
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _wait_for_ssh(self) -> None:
        deadline = time.monotonic() + _SECONDS_TO_START
        for host in self.all:
            answers = "exec 3<>/dev/tcp/127.0.0.1/22"
            while self.run(host, ["bash", "-c", answers]).returncode:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"host{host} has no sshd: {(self.folder / f'sshd{host}.log').read_text()}")
                time.sleep(0.05)

    # What a user does on them

    def run(
        self,
        host: int,
        command: Sequence[str],
        *,
        seconds: float = 60.0,
        folder: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, in a user's shell there; code 124 if it took longer than `seconds`.

        Args:
            env: variables of the shell, beside or instead of those of `shell_variables` and of a login.
        """
        words = [*self._spaces[host].entering(str(folder)), *command]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**shell_variables(), **self._login(host), **(env or {})},
        )
        try:
            out, err = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            # Whoever was started holds the pipes: without an end of all of them reading would wait on.
            self._end_children_of(process.pid)
            process.kill()
            try:
                out, err = process.communicate(timeout=5)
            except subprocess.TimeoutExpired as late:
                out, err = ((said or b"").decode(errors="replace") for said in (late.stdout, late.stderr))
            code = 124
        return subprocess.CompletedProcess(words, code, out, err)

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        log: Path,
        folder: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A command on a host that goes on beside what follows; what it says is added to `log`."""
        with log.open("ab") as said:
            process = subprocess.Popen(
                [*DIES_WITH_ITS_PARENT, *self._spaces[host].entering(str(folder)), *command],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**shell_variables(), **self._login(host), **(env or {})},
            )
        self._started.append(process)
        return process

    def do(self, host: int, script: str) -> None:
        """What an administrator does on a host, as a shell script: mount, umount, change its network."""
        self._spaces[host].do(script)

    # What is on them

    def is_up(self, host: int) -> bool:
        """Whether it has power."""
        return self._spaces[host].is_up()

    def processes(self, host: int, containing: str = "") -> dict[int, str]:
        """Command lines in which a text is found, by the process's number on this machine."""
        return {pid: line for pid, line in self._spaces[host].processes().items() if containing in line}

    def ranks(self, host: int) -> dict[int, int]:
        """Rank numbers of the processes that train there, by the process's number on this machine."""
        found = {}
        for pid, line in self.processes(host, "pretrain").items():
            words = Path(line.split()[0]).name
            if not words.startswith("python") or any(launcher in line for launcher in _LAUNCHERS):
                continue
            variables = variables_of(pid)
            number = next((variables[name] for name in _RANK_VARIABLES if name in variables), None)
            if number is not None:
                found[pid] = int(number)
        return found

    def left_over(self, within: float = 0.0) -> list[str]:
        """Processes of a run, of its launchers or their connections on any host that has power.

        Args:
            within: seconds that they may take to end.
        """
        words = ("pretrain", "preflight", "keep_running", "cluster.agent", *_LAUNCHERS)
        deadline = time.monotonic() + within
        while True:
            left = [
                f"host{host}: {line[:100]}"
                for host in self.all
                if self.is_up(host)
                for line in self.processes(host).values()
                if any(word in line for word in words)
            ]
            if not left or time.monotonic() >= deadline:
                return left
            time.sleep(0.1)

    # What happens to them

    def link(self, host: int, *, up: bool) -> None:
        """Plug its cable in, or out, at the switch: it keeps its own address, and nobody hears from it."""
        assert self._switch is not None
        self._switch.do(f"ip link set port{host} {'up' if up else 'down'}")

    def rate(self, host: int, rate: str) -> None:
        """Throttle both directions of its cable, for example to `100mbit`."""
        assert self._switch is not None
        for space, device in ((self._spaces[host], "eth0"), (self._switch, f"port{host}")):
            space.do(f"tc qdisc replace dev {device} root tbf rate {rate} burst 64k latency 400ms")

    def delay(self, host: int, seconds: float, *, drop: bool = False) -> None:
        """Hold every frame of a relayed host up, each way, or drop all."""
        self._control(host).write_text(f"{seconds} {int(drop)}")

    def _control(self, host: int) -> Path:
        return self.folder / f"relay{host}"

    @staticmethod
    def _end_children_of(pid: int) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()


_LAUNCHERS = ("launcher.launch", "bin/torchrun", "bin/deepspeed", "mpirun", "prted", "prterun", "orted", "pdsh", "srun")


def shell_variables() -> dict[str, str]:
    """A user's shell in which the project's environment is activated and its checkout installed; no more."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": _HOME,
    }


def variables_of(pid: int) -> dict[str, str]:
    """The environment that a process of this machine was started with; empty once it has gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # gone
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)
