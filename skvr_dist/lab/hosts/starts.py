"""Every way in which users start a run on several hosts; each is a row of the table of starts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skvr_dist.lab.hosts.case import CPU, STEPS, Case, Ending, Lab, losses, write_hostfile
from skvr_dist.lab.hosts.hosts import Hosts, shell_variables
from skvr_dist.lab.hosts.slurm import PROGRAMS as SLURM
from skvr_dist.lab.hosts.slurm import start_slurm

SECONDS = 150.0
BIN = shell_variables()["PATH"].split(":")[0]
_DOCKER = "172.17.0.1"
_PRETRAIN = "launch/pretrain.py"


def judge(
    lab: Lab, hosts: Hosts, run: Path, done: subprocess.CompletedProcess[str], ranks: int = 2, says: str = ""
) -> Ending:
    """A start that must train: code 0, the losses of as many ranks on one machine, nothing left running.

    Args:
        says: must be on the console.
    """
    ending = Ending("trains, same losses")
    ending.expect(done.returncode == 0, f"code {done.returncode}: {last_words(done)}")
    found, expected = losses(run), lab.reference(ranks)
    ending.expect(found == expected, f"losses {found}, on one machine {expected}")
    ending.expect(says in done.stdout + done.stderr, f"does not say «{says}»: {last_words(done)}")
    ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
    if ending.misses:
        ending.found = f"code {done.returncode}, {len(found)} of {STEPS} steps"
    return ending


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The lines of a console that say what went wrong."""
    lines = (done.stdout + "\n" + done.stderr).splitlines()
    telling = [line for line in lines if re.search(r"error|Error|refused|denied|cannot|timed out", line)]
    return " | ".join(line[:300] for line in (telling or lines)[-4:])


Command = Callable[[Lab, Hosts, Path], Sequence[str]]


def start(
    name: str,
    command: Command,
    *,
    ranks: int = 2,
    setup: Mapping[str, Any] | None = None,
    says: str = "",
    slurm: bool = False,
    env: Mapping[str, str] | None = None,
) -> Callable[[Lab], Ending]:
    """A case in which one command on the first host starts the run.

    Args:
        setup: fields of the hosts' setup.
        says: must be on the console.
        slurm: whether the hosts are a cluster of Slurm.
        env: variables of the user's shell.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2, **(setup or {})) as hosts:
            if slurm:
                start_slurm(hosts)
            done = hosts.run(1, command(lab, hosts, run), env=CPU if env is None else env, seconds=SECONDS)
            return judge(lab, hosts, run, done, ranks, says)

    return play


def deepspeed(*options: str, slots: int = 1) -> Command:
    """`deepspeed --hostfile`, as users type it."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        launcher = ["deepspeed", "--hostfile", str(write_hostfile(hosts, slots)), "--log_level", "error", *options]
        return [*launcher, _PRETRAIN, *lab.arguments(run)]

    return command


def mpirun(program: str, *before: str) -> Command:
    """mpirun, a rank per host; `DS_ACCELERATOR` is passed as users of Open MPI pass variables."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        launcher = [*before, program, "--allow-run-as-root", "-x", "DS_ACCELERATOR", "-np", "2"]
        if not before:
            launcher += ["--hostfile", str(write_hostfile(hosts))]
        return [*launcher, f"{BIN}/python", _PRETRAIN, *lab.arguments(run)]

    return command


_TORCHRUN = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29400"]


def srun(*program: str) -> Command:
    """A task on each of two hosts."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        return ["srun", "-N2", "--ntasks-per-node=1", *program, _PRETRAIN, *lab.arguments(run)]

    return command


def on_each_host(name: str, words: Callable[[Hosts, int], Sequence[str]], **setup: Any) -> Callable[[Lab], Ending]:
    """A case in which the user types a command on each of two hosts.

    Args:
        words: the launcher and its options on a host, by its number from 0 on.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2, **setup) as hosts:
            arguments, log = lab.arguments(run), hosts.folder / "second.log"
            env = {**CPU, **hosts.setup.login}
            second = hosts.start(2, [*words(hosts, 1), _PRETRAIN, *arguments], log=log, env=env)
            done = hosts.run(1, [*words(hosts, 0), _PRETRAIN, *arguments], env=env, seconds=SECONDS)
            code = second.wait(30)
            ending = judge(lab, hosts, run, done)
            ending.expect(code == 0, f"code {code} on the second host: {log.read_text()[-500:]}")
            return ending

    return play


def _no_ssh(hosts: Hosts, number: int) -> Sequence[str]:
    launcher = ["deepspeed", "--hostfile", str(write_hostfile(hosts)), "--no_ssh", "--node_rank", str(number)]
    return [*launcher, "--master_addr", "host1", "--log_level", "error"]


STARTS = [
    Case(
        "deepspeed", "start", "`deepspeed --hostfile`: pdsh over ssh", start("deepspeed", deepspeed()), True, ["pdsh"]
    ),
    Case("deepspeed_2x2", "start", "the same, two ranks a host", start("deepspeed_2x2", deepspeed(slots=2), ranks=4)),
    Case("no_ssh", "start", "`deepspeed --no_ssh` on each host", on_each_host("no_ssh", _no_ssh)),
    Case(
        "torchrun",
        "start",
        "`torchrun` with c10d on each host",
        on_each_host("torchrun", lambda hosts, number: ["torchrun", *_TORCHRUN]),
    ),
    Case("mpirun_pypi", "start", "PyPI's `mpirun`", start("mpirun_pypi", mpirun(f"{BIN}/mpirun"))),
    Case(
        "mpirun_debian",
        "start",
        "Debian's `mpirun`",
        start("mpirun_debian", mpirun("/usr/bin/mpirun")),
        programs=["/usr/bin/mpirun"],
    ),
    Case(
        "srun_tasks",
        "start",
        "`srun` with a task per rank",
        start("srun_tasks", srun(f"{BIN}/python"), slurm=True),
        True,
        SLURM,
    ),
    Case(
        "srun_torchrun",
        "start",
        "`srun` with torchrun on each host",
        start("srun_torchrun", srun(f"{BIN}/torchrun", *_TORCHRUN), slurm=True),
        programs=SLURM,
    ),
    Case(
        "deepspeed_slurm",
        "start",
        "`deepspeed --launcher slurm`",
        start("deepspeed_slurm", deepspeed("--launcher", "slurm"), slurm=True),
        programs=SLURM,
    ),
    Case(
        "salloc_mpirun",
        "start",
        "`mpirun` in an allocation of `salloc`",
        start("salloc_mpirun", mpirun(f"{BIN}/mpirun", "salloc", "-N2", "--ntasks-per-node=1"), slurm=True),
        programs=SLURM,
    ),
    Case(
        "debian_names",
        "start",
        "`deepspeed --hostfile`, each host is 127.0.1.1 to itself",
        start("debian_names", deepspeed(), setup={"debian_names": True}),
        programs=["pdsh"],
    ),
    Case(
        "debian_names_torchrun",
        "start",
        "`torchrun`, each host is 127.0.1.1 to itself",
        on_each_host("debian_names_torchrun", lambda hosts, number: ["torchrun", *_TORCHRUN], debian_names=True),
    ),
    Case(
        "docker0_mpirun",
        "start",
        "`mpirun`, docker0 comes first in `hostname -I`",
        start("docker0_mpirun", mpirun(f"{BIN}/mpirun"), setup={"docker0": _DOCKER}),
    ),
]
