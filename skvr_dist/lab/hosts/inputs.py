"""What users and hosts get wrong before a run starts; each is a row of the table of bad input.

With `launch/deepspeed.sh` the preflight names it before anything starts, with code 2. Without, the run's ranks or the
launcher do, at the latest after the run's time-out.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skvr_dist.lab.hosts.case import CPU, Case, Ending, Lab, write_hostfile
from skvr_dist.lab.hosts.hosts import NETWORK, ROOT, Hosts
from skvr_dist.lab.hosts.starts import DOCKER, PRETRAIN, SECONDS, deepspeed, last_words

_SECONDS_TO_START = 120.0  # Python, PyTorch and DeepSpeed on a busy machine
_TIMEOUT_SECONDS = 30.0  # of the runs
_LONG = 10.0  # after the time-out, until everything must have ended
_ENVIRONMENT = Path(sys.prefix)
_SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))

Spoil = Callable[[Hosts], None]


def refused(
    name: str,
    says: str,
    *,
    hostfile: Callable[[Hosts], str] = lambda hosts: "",
    spoil: Spoil = lambda hosts: None,
    own_disk: bool = False,
    **setup: Any,
) -> Callable[[Lab], Ending]:
    """A case in which `launch/deepspeed.sh` refuses to start.

    Args:
        says: what must be on the console, the host's name in it.
        hostfile: its content; empty: all hosts, one slot each.
        spoil: what is done to the hosts before.
        own_disk: whether the second host has runs on a disk of its own.
        setup: fields of the hosts' setup.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2, **setup) as hosts:
            file = write_hostfile(hosts)
            if content := hostfile(hosts):
                file.write_text(content)
            spoil(hosts)
            if own_disk:
                hosts.do(2, f"mount -t tmpfs none {run.parent}")
            env = {**CPU, "HOSTFILE": str(file)}
            command = ["launch/deepspeed.sh", *lab.arguments(run)]
            done = hosts.run(1, command, env=env, seconds=SECONDS)
            ending = Ending(f"code {done.returncode}, named: {says}")
            ending.expect(done.returncode == 2, f"code {done.returncode}: {last_words(done)}")
            ending.expect(says in done.stderr, f"does not say «{says}»: {last_words(done)}")
            ending.expect(not (run / "logs").exists(), "the run has begun")
            ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
            return ending

    return play


def ends(
    name: str,
    says: str,
    *options: str,
    spoil: Callable[[Hosts, Path], None] = lambda hosts, run: None,
    code: int = 2,
    **setup: Any,
) -> Callable[[Lab], Ending]:
    """A case in which a bare `deepspeed --hostfile` is typed and its ranks say what is wrong, and end in time.

    Args:
        code: that it ends with: pdsh returns the largest code of all hosts.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2, **setup) as hosts:
            spoil(hosts, run)
            started = time.monotonic()
            done = hosts.run(1, deepspeed(*options)(lab, hosts, run), env=CPU, seconds=SECONDS)
            seconds = time.monotonic() - started
            ending = Ending(f"code {done.returncode}, named: {says}")
            ending.expect(done.returncode == code, f"code {done.returncode}: {last_words(done)}")
            ending.expect(says in done.stdout + done.stderr, f"does not say «{says}»: {last_words(done)}")
            latest = _TIMEOUT_SECONDS + _LONG + _SECONDS_TO_START
            ending.expect(seconds < latest, f"took {seconds:.0f} s of at most {latest:.0f}")
            ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
            return ending

    return play


def on_second(script: str) -> Spoil:
    """Something that an administrator has done on the second host."""
    return lambda hosts: hosts.do(2, script)


def _other_file(hosts: Hosts, file: Path, old: str, new: str) -> None:
    """Let the second host see another content of a file."""
    content = file.read_text()
    if old not in content:
        raise RuntimeError(f"{file} holds no {old!r}")
    other = hosts.folder / "other"
    other.write_text(content.replace(old, new, 1))
    hosts.do(2, f"mount --bind {other} {file}")


def _other_torch(hosts: Hosts) -> None:
    """Let the second host's environment say that it holds another release of PyTorch."""
    from importlib.metadata import version

    metadata = next(_SITE.glob("torch-*.dist-info")) / "METADATA"
    _other_file(hosts, metadata, f"Version: {version('torch')}", "Version: 2.12.0")


def _other_code(hosts: Hosts) -> None:
    _other_file(hosts, ROOT / "skvr_dist/routing/strategy.py", '"""', '"""Older. ')


def _other_preset(hosts: Hosts) -> None:
    _other_file(hosts, ROOT / "configs/model/tiny.yaml", "num_attention_heads: 4", "num_attention_heads: 8")


def _take_port(hosts: Hosts) -> None:
    """Something else listens where the ranks are to meet."""
    hosts.start(1, ["python3", "-m", "http.server", "29500"], log=hosts.folder / "http.log")
    while hosts.run(1, ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/29500"]).returncode:
        time.sleep(0.1)


def _forget_first(hosts: Hosts) -> None:
    """The second host's /etc/hosts lacks the first."""
    file = hosts.folder / "host2" / "hosts"
    file.write_text("127.0.0.1 localhost\n" + f"{NETWORK}.2 host2\n")


def _own_copies(hosts: Hosts, run: Path) -> None:
    """A run that each host has on its own disk, as after copying it there."""
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"id": "0123456789abcdef"}')
    copy = hosts.folder / "copy"
    shutil.copytree(run, copy)
    hosts.do(2, f"mount --bind {copy} {run}")


def _refused(
    name: str, what: str, says: str, *, quick: bool = False, programs: Sequence[str] = ("pdsh",), **how: Any
) -> Case:
    return Case(name, "input", f"`launch/deepspeed.sh`: {what}", refused(name, says, **how), quick, programs)


def _ends(name: str, what: str, says: str, *options: str, **how: Any) -> Case:
    return Case(name, "input", f"`deepspeed --hostfile`: {what}", ends(name, says, *options, **how), programs=["pdsh"])


def _misspelt(lab: Lab) -> Ending:
    run = lab.run_folder("hostfile_missing_bare")
    with lab.hosts(2) as hosts:
        command = ["deepspeed", "--hostfile", "hostfiel", "--log_level", "error", PRETRAIN, *lab.arguments(run)]
        done = hosts.run(1, command, env=CPU, seconds=SECONDS)
        says = "--hostfile hostfiel, which is not there"
        ending = Ending(f"code {done.returncode}, named: {says}")
        ending.expect(done.returncode == 2, f"code {done.returncode}: {last_words(done)}")
        ending.expect(says in done.stderr, f"does not say «{says}»: {last_words(done)}")
        ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
        return ending


INPUTS = [
    _refused(
        "hostfile_missing",
        "the hostfile's name is misspelt",
        "hostfile: No such file",
        spoil=lambda hosts: (hosts.folder / "hostfile").unlink(),
    ),
    _refused(
        "doubled_host",
        "a host stands in the hostfile twice",
        "names host1 a second time",
        hostfile=lambda hosts: "host1 slots=1\nhost2 slots=1\nhost1 slots=1\n",
    ),
    _refused(
        "two_names",
        "two lines of the hostfile are one host",
        f"{NETWORK}.2: is the same host as host2",
        hostfile=lambda hosts: f"host1 slots=1\nhost2 slots=1\n{NETWORK}.2 slots=1\n",
    ),
    _refused(
        "unequal_slots",
        "slots differ",
        "gives host1 2 slots and host2 1",
        hostfile=lambda hosts: "host1 slots=2\nhost2 slots=1\n",
    ),
    _refused(
        "unknown_host",
        "a host that there is not",
        "host9: there is no host of that name",
        hostfile=lambda hosts: "host1 slots=1\nhost9 slots=1\n",
    ),
    _refused(
        "unreachable_host",
        "a host without power",
        "host2: it does not answer ssh",
        spoil=lambda hosts: hosts.power_off(2),
    ),
    _refused(
        "unknown_key", "ssh does not know the hosts' keys", "host1: its key is not known to ssh here", knows_hosts=False
    ),
    _refused(
        "no_pdsh",
        "pdsh is not installed",
        "pdsh is not installed here",
        spoil=lambda hosts: hosts.do(1, "mount --bind /dev/null $(readlink -f /usr/bin/pdsh)"),
    ),
    _refused(
        "no_environment",
        "a host lacks the environment",
        "host2: it lacks a",
        spoil=on_second(f"mount -t tmpfs none {_ENVIRONMENT}"),
    ),
    _refused(
        "no_code",
        "a host lacks the checkout",
        "error: host2: ",  # it lacks the project, or the run's files where the environment brings the project
        spoil=on_second(f"mount -t tmpfs none {ROOT}"),
    ),
    _refused(
        "other_version",
        "a host has another PyTorch",
        "host2: has torch 2.12.0, but host1 has",
        spoil=_other_torch,
        quick=True,
    ),
    _refused("other_code", "a host has other code", "host2: its skvr_dist's code", spoil=_other_code),
    _refused("other_config", "a host has another preset", "host2: its configuration", spoil=_other_preset),
    _refused("name_missing", "a host does not know the first", "host2: does not know host1", spoil=_forget_first),
    _refused("port_taken", "the port is taken on the first host", "host1: port 29500", spoil=_take_port),
    _refused(
        "not_shared",
        "each host has an output folder of its own",
        "is not the same folder as on host1",
        own_disk=True,
    ),
    Case("hostfile_missing_bare", "input", "`deepspeed --hostfile`: its name is misspelt", _misspelt),
    _ends(
        "port_taken_bare", "the port is taken on the first host", "port 29500 of ", spoil=lambda h, run: _take_port(h)
    ),
    _ends(
        "docker0_bare", "docker0 comes first in `hostname -I`", "172.17.0.1, which is docker0 of host2", docker0=DOCKER
    ),
    _ends(
        "no_environment_bare",
        "a host lacks the environment",
        "but not all 2 ranks of this run came; start rank 1 (host number 2)",
        spoil=lambda hosts, run: hosts.do(2, f"mount -t tmpfs none {_ENVIRONMENT}"),
        code=127,  # the shell's, where there is no such program
    ),
    _ends(
        "other_version_bare",
        "a host has another PyTorch",
        "and '2.12.0' on host2",
        spoil=lambda h, run: _other_torch(h),
    ),
    _ends(
        "no_data_bare",
        "a host lacks the data",
        "on host2 has ended: ",
        spoil=lambda hosts, run: hosts.do(2, f"mount -t tmpfs none {run.parents[1] / 'data'}"),
    ),
    _ends(
        "no_data_first_bare",
        "the first host lacks the data",
        "on host1 has ended: ",
        spoil=lambda hosts, run: hosts.do(1, f"mount -t tmpfs none {run.parents[1] / 'data'}"),
    ),
    _ends("other_code_bare", "a host has other code", "code of skvr_dist", spoil=lambda h, run: _other_code(h)),
    _ends(
        "not_shared_bare",
        "a new output folder on each host's own disk",
        "on host host2 (rank 1) is not the folder that rank 0 writes to",
        spoil=lambda hosts, run: hosts.do(2, f"mount -t tmpfs none {run.parent}"),
    ),
    _ends(
        "own_copies_bare",
        "each host has a copy of the run's folder",
        "on host host2 (rank 1) is not the folder that rank 0 writes to",
        spoil=_own_copies,
    ),
]
