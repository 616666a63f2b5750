"""Every way in which users start a run on several hosts; each is a row of the table of starts."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skvr_dist.lab.hosts.case import CPU, STEPS, Case, Ending, Lab, losses, write_hostfile
from skvr_dist.lab.hosts.hosts import Hosts, shell_variables, variables_of
from skvr_dist.lab.hosts.slurm import PROGRAMS as SLURM
from skvr_dist.lab.hosts.slurm import start_slurm
from skvr_dist.run.folder import RunFolder

SECONDS = 300.0
_SECONDS_TO_LEAVE = 10.0  # the srun of an mpirun ends after it
BIN = shell_variables()["PATH"].split(":")[0]
DOCKER = "172.17.0.1"
PRETRAIN = "launch/pretrain.py"


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
    left = hosts.left_over(_SECONDS_TO_LEAVE)
    ending.expect(not left, f"left running: {left}")
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
    number: int = 2,
    setup: Mapping[str, Any] | None = None,
    says: str = "",
    slurm: bool = False,
    env: Mapping[str, str] | None = None,
) -> Callable[[Lab], Ending]:
    """A case in which one command on the first host starts the run.

    Args:
        number: of hosts.
        setup: fields of the hosts' setup.
        says: must be on the console.
        slurm: whether the hosts are a cluster of Slurm.
        env: variables of the user's shell.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(number, **(setup or {})) as hosts:
            if slurm:
                start_slurm(hosts)
            done = hosts.run(1, command(lab, hosts, run), env=CPU if env is None else env, seconds=SECONDS)
            return judge(lab, hosts, run, done, ranks, says)

    return play


def deepspeed(*options: str, slots: int = 1) -> Command:
    """`deepspeed --hostfile`, as users type it."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        launcher = ["deepspeed", "--hostfile", str(write_hostfile(hosts, slots)), "--log_level", "error", *options]
        return [*launcher, PRETRAIN, *lab.arguments(run)]

    return command


def mpirun(program: str, *before: str) -> Command:
    """mpirun, a rank per host; `DS_ACCELERATOR` is passed as users of Open MPI pass variables."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        launcher = [*before, program, "--allow-run-as-root", "-x", "DS_ACCELERATOR", "-np", "2"]
        if not before:
            launcher += ["--hostfile", str(write_hostfile(hosts))]
        return [*launcher, f"{BIN}/python", PRETRAIN, *lab.arguments(run)]

    return command


def script(file: str, *overrides: str, names: Sequence[str] | None = None, **env: str) -> Command:
    """One of the scripts of `launch/`, with a hostfile of one slot for each host, or for those of these names."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        hostfile = write_hostfile(hosts, names=names)
        variables = [f"{name}={value}" for name, value in {"HOSTFILE": hostfile, **env}.items()]
        return ["env", *variables, f"launch/{file}", *lab.arguments(run), *overrides]

    return command


def quoted(lab: Lab) -> Ending:
    """Arguments and variables that a shell would change reach the ranks of all hosts as they are."""
    run = lab.run_folder("quotes")
    strategies, profiles = 'evaluate.strategies=["0,1",full,half]', 'evaluate.profiles={"half":"every:2"}'
    routing = "routing.cross_layer_prob={points: [[0.0, 0.0], [0.5, 0.5]]}"
    odd = "a \"b\" $HOME `c` \\ 'd' %h (e) {f,g}"
    with lab.hosts(2) as hosts:
        command = script("deepspeed.sh", strategies, profiles, routing)(lab, hosts, run)
        log = hosts.folder / "console.txt"
        process = hosts.start(1, command, log=log, env={**CPU, "SKVR_ODD": odd})
        arrived: dict[int, str | None] = {}
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            for host in hosts.all:
                for pid, rank in hosts.ranks(host).items():
                    if variables := variables_of(pid):  # of one that has not ended meanwhile
                        arrived[rank] = variables.get("SKVR_ODD")
            time.sleep(0.2)
        said = log.read_text(errors="replace")
        ending = Ending("trains; all arrives as it was")
        ending.expect(process.poll() == 0, f"code {process.poll()}: {said[-1500:]}")
        config = RunFolder(run).config.read_text() if RunFolder(run).config.exists() else ""
        for part in ("- 0,1", "half: every:2", "points"):
            ending.expect(part in config, f"the run's configuration lacks «{part}»")
        for rank in range(2):
            ending.expect(arrived.get(rank) == odd, f"rank {rank} got SKVR_ODD={arrived.get(rank)}, not {odd}")
        ending.expect(f"SKVR_ODD={odd}" in said, "the console does not list what is passed")
        return ending


def finetuned(lab: Lab) -> Ending:
    """`PROGRAM=launch/finetune.py` in the place of pretraining, from a checkpoint, on questions."""
    run, here, start = lab.run_folder("finetuned"), lab.run_folder("finetuned_here"), lab.run_folder("start")
    lab.train_here(1, PRETRAIN, *lab.arguments(start, train__steps=2, parallel__pipeline=1))
    questions = lab.folder / "questions.jsonl"
    asked = [{"context": f"Item {n} costs {n * 7}.", "question": f"{n}?", "answer": str(n * 7)} for n in range(60)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked))
    source = json.dumps({"asked": {"path": str(questions), "format": "examples"}})
    keys = [f"data.train={source}", f"data.validation={source}", f"train.steps={STEPS}", *_FINETUNING]
    with lab.hosts(2) as hosts:
        words = ["--from", str(start), "--config", "finetune", *keys]
        variables = ["PROGRAM=launch/finetune.py", f"HOSTFILE={write_hostfile(hosts)}"]
        command = ["env", *variables, "launch/deepspeed.sh", *words, f"train.output_dir={run}"]
        done = hosts.run(1, command, env=CPU, seconds=SECONDS)
        lab.train_here(2, "launch/finetune.py", *words, f"train.output_dir={here}")
        ending = Ending("fine-tunes, same losses")
        ending.expect(done.returncode == 0, f"code {done.returncode}: {last_words(done)}")
        found, expected = losses(run), losses(here)
        ending.expect(len(found) == STEPS, f"losses of {len(found)} of {STEPS} steps")
        ending.expect(found == expected, f"losses {found}, on one machine {expected}")
        ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
        return ending


_FINETUNING = [
    "data.sequence_length=64",
    "data.lanes=8",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.precision=fp32",
    "train.log_every_steps=1",
    "evaluate.sequences=4",
    "parallel.pipeline=2",
]
_TORCHRUN = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29400"]


def srun(*program: str) -> Command:
    """A task on each of two hosts."""

    def command(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
        return ["srun", "-N2", "--ntasks-per-node=1", *program, PRETRAIN, *lab.arguments(run)]

    return command


def on_each_host(name: str, words: Callable[[Hosts, int], Sequence[str]], **setup: Any) -> Callable[[Lab], Ending]:
    """A case in which the user types a command on each of two hosts.

    Args:
        words: the command on a host, by its number from 0 on, up to the run's own arguments.
        setup: fields of the hosts' setup.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2, **setup) as hosts:
            arguments, log = lab.arguments(run), hosts.folder / "second.log"
            env = {**CPU, **hosts.setup.login}
            second = hosts.start(2, [*words(hosts, 1), *arguments], log=log, env=env)
            done = hosts.run(1, [*words(hosts, 0), *arguments], env=env, seconds=SECONDS)
            code = second.wait(30)
            ending = judge(lab, hosts, run, done)
            ending.expect(code == 0, f"code {code} on the second host: {log.read_text()[-500:]}")
            return ending

    return play


def _no_ssh(hosts: Hosts, number: int) -> Sequence[str]:
    launcher = ["deepspeed", "--hostfile", str(write_hostfile(hosts)), "--no_ssh", "--node_rank", str(number)]
    return [*launcher, "--master_addr", "host1", "--log_level", "error", PRETRAIN]


def sbatch(lab: Lab, hosts: Hosts, run: Path) -> Sequence[str]:
    """The job of `launch/slurm.sbatch`, for hosts with one rank and no GPU, from submitting it to its end."""
    log = hosts.folder / "job.log"
    words = [*_SBATCH, "--wait", f"--output={log}", "launch/slurm.sbatch", *lab.arguments(run)]
    return ["sh", "-c", f"{shlex.join(words)}; code=$?; cat {log}; exit $code"]


_SBATCH = ["sbatch", "--ntasks-per-node=1", "--gpus-per-node=0"]


def requeued(lab: Lab) -> Ending:
    """A job that Slurm asks to end, as it does before the time is up, and that goes on by itself."""
    run, steps = lab.run_folder("requeued"), 40
    with lab.hosts(2) as hosts:
        start_slurm(hosts)
        log = hosts.folder / "job.log"
        words = [*_SBATCH, "--parsable", f"--output={log}", "launch/slurm.sbatch"]
        job = hosts.run(1, [*words, *lab.arguments(run, train__steps=steps)], env=CPU).stdout.strip()
        deadline = time.monotonic() + SECONDS
        while max(losses(run), default=0) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
        hosts.run(1, ["scancel", "--signal=USR1", job])
        while (state := _state_of(hosts, job)) not in ("COMPLETED", "FAILED", "") and time.monotonic() < deadline:
            time.sleep(1)
            if state == "PENDING":  # Slurm lets a requeued job wait for two minutes
                hosts.run(1, ["scontrol", "update", f"JobId={job}", "StartTime=now"])
        said = log.read_text()
        ending = Ending("saved, requeued, same losses")
        ending.expect(state == "COMPLETED", f"the job is {state}: {said[-500:]}")
        ending.expect("SIGUSR1 ended the run after step" in said and "resumed " in said, f"no new start: {said[-500:]}")
        ending.expect(losses(run) == lab.reference(2, steps), "other losses than on one machine")
        ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
        return ending


def _state_of(hosts: Hosts, job: str) -> str:
    shown = hosts.run(1, ["scontrol", "show", "job", job]).stdout
    return next(iter(re.findall(r"JobState=(\w+)", shown)), "")


def _torchrun(hosts: Hosts, number: int) -> Sequence[str]:
    return ["torchrun", *_TORCHRUN, PRETRAIN]


def _torchrun_script(hosts: Hosts, number: int) -> Sequence[str]:
    return ["env", "FIRST=host1", "HOSTS=2", "RANKS=1", "launch/torchrun.sh"]


def _trains(
    name: str, what: str, command: Command, *, programs: Sequence[str] = (), quick: bool = False, **how: Any
) -> Case:
    """A row for a command on the first host; `how` are options of `start`."""
    needed = [*programs, *(SLURM if how.get("slurm") else ())]
    return Case(name, "start", what, start(name, command, **how), quick, needed)


def _trains_on_each(
    name: str, what: str, words: Callable[[Hosts, int], Sequence[str]], *, quick: bool = False, **setup: Any
) -> Case:
    return Case(name, "start", what, on_each_host(name, words, **setup), quick)


_PYTHON = f"{BIN}/python"
_DEBIAN_NAMES: dict[str, Any] = {"debian_names": True}
_PDSH = ["pdsh"]

STARTS = [
    _trains("deepspeed", "`deepspeed --hostfile`: pdsh over ssh", deepspeed(), programs=_PDSH),
    _trains("deepspeed_2x2", "`deepspeed --hostfile`, two ranks a host", deepspeed(slots=2), ranks=4, programs=_PDSH),
    _trains(
        "debian_names",
        "`deepspeed --hostfile`, each host is 127.0.1.1 to itself",
        deepspeed(),
        setup=_DEBIAN_NAMES,
        programs=_PDSH,
        quick=True,
    ),
    _trains_on_each("no_ssh", "`deepspeed --no_ssh` on each host", _no_ssh),
    _trains_on_each("torchrun", "`torchrun` with c10d on each host", _torchrun),
    _trains_on_each(
        "debian_names_torchrun", "`torchrun`, each host is 127.0.1.1 to itself", _torchrun, **_DEBIAN_NAMES
    ),
    _trains("mpirun_pypi", "PyPI's `mpirun`", mpirun(f"{BIN}/mpirun")),
    _trains("mpirun_debian", "Debian's `mpirun`", mpirun("/usr/bin/mpirun"), programs=["/usr/bin/mpirun"]),
    _trains(
        "docker0_mpirun",
        "PyPI's `mpirun`, docker0 comes first in `hostname -I`",
        mpirun(f"{BIN}/mpirun"),
        setup={"docker0": DOCKER},
    ),
    _trains("srun_tasks", "`srun` with a task per rank", srun(_PYTHON), slurm=True),
    _trains("srun_torchrun", "`srun` with torchrun on each host", srun(f"{BIN}/torchrun", *_TORCHRUN), slurm=True),
    _trains(
        "deepspeed_slurm",
        "`deepspeed --launcher slurm`",
        deepspeed("--launcher", "slurm", "--num_nodes", "2"),  # else Slurm puts both tasks on one host
        slurm=True,
    ),
    _trains(
        "salloc_mpirun",
        "`mpirun` in an allocation of `salloc`",
        mpirun(f"{BIN}/mpirun", "salloc", "-N2", "--ntasks-per-node=1"),
        slurm=True,
    ),
    _trains(
        "docker0",
        "`launch/deepspeed.sh`, docker0 comes first in `hostname -I`",
        script("deepspeed.sh"),
        setup={"docker0": DOCKER},
        programs=_PDSH,
    ),
    _trains(
        "login_node",
        "`launch/deepspeed.sh`, from a host that trains nothing",
        script("deepspeed.sh", names=["host2", "host3"]),
        number=3,
        programs=_PDSH,
    ),
    Case("quotes", "start", "`launch/deepspeed.sh`, arguments and variables full of quotes", quoted, programs=_PDSH),
    Case(
        "finetune_script",
        "start",
        "`PROGRAM=launch/finetune.py launch/deepspeed.sh`",
        finetuned,
        programs=_PDSH,
    ),
    _trains("mpirun_script", "`launch/mpirun.sh`", script("mpirun.sh", MPIRUN_OPTIONS="--allow-run-as-root")),
    _trains_on_each("torchrun_script", "`launch/torchrun.sh` on each host", _torchrun_script),
    _trains("sbatch", "`sbatch launch/slurm.sbatch`", sbatch, slurm=True, says="can run together"),
    Case(
        "sbatch_requeued", "start", "`sbatch launch/slurm.sbatch`, asked to end before it has", requeued, programs=SLURM
    ),
]
