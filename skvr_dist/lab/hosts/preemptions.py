"""A run is told to end, wherever the signal arrives: all ranks save first, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from skvr_dist.lab.hosts.case import CPU, Case, Ending, Lab, losses
from skvr_dist.lab.hosts.hosts import Hosts
from skvr_dist.lab.hosts.kept_run import FAULT_STEP, KeptRun
from skvr_dist.lab.hosts.slurm import PROGRAMS as SLURM_PROGRAMS
from skvr_dist.lab.hosts.slurm import start_slurm
from skvr_dist.lab.hosts.starts import BIN, SECONDS, Command, deepspeed, last_words, mpirun, script, srun
from skvr_dist.run.folder import RunFolder

_STEPS = 40
_SECONDS_TO_END, _SECONDS_TO_LEAVE = 120.0, 60.0  # Python takes its time on a busy machine


def told_to_end(
    name: str, send: Callable[[KeptRun], None], signal_name: str = "SIGTERM", *, by_srun: bool = False
) -> Callable[[Lab], Ending]:
    """A case: somebody is told to end; all save first, the code is 75, and the same command goes on."""

    def play(lab: Lab) -> Ending:
        with lab.hosts(2) as hosts:
            if by_srun:
                start_slurm(hosts)
            run = KeptRun(lab, hosts, name, started_by="srun" if by_srun else "user")
            run.wait_for_step(FAULT_STEP)
            run.mark()
            send(run)
            code = run.code()
            ending = Ending(f"saved, code {code}")
            ending.expect(code == 75, f"code {code}: {run.console()[-1500:]}")
            ending.expect("which is saved" in run.console(), "nobody says that it is saved")
            ending.expect(f"not started again after {signal_name}" in run.console(), "does not say why it ended")
            quiet = run.seconds_until_quiet(1, 2, limit=_SECONDS_TO_LEAVE)
            ending.expect(quiet is not None, f"left running: {hosts.left_over()}")
            run.start()
            run.expect_finished(lab, ending)
            return ending

    return play


def launcher_told_to_end(
    name: str,
    command: Command,
    tell: Callable[[Hosts], None],
    *,
    code: int,
    slurm: bool = False,
    everywhere: bool = False,
) -> Callable[[Lab], Ending]:
    """A case: a run that nobody keeps running is told to end; all its ranks save, and nothing is left.

    Args:
        command: on the first host; `everywhere`: on the second one too.
        tell: sends the signal.
        code: that the launcher on the first host ends with.
    """

    def play(lab: Lab) -> Ending:
        run = lab.run_folder(name)
        with lab.hosts(2) as hosts:
            if slurm:
                start_slurm(hosts)
            words, log = [*command(lab, hosts, run), f"train.steps={_STEPS}"], hosts.folder / "console.txt"
            process = hosts.start(1, words, log=log, env=CPU)
            if everywhere:
                hosts.start(2, words, log=hosts.folder / "second.txt", env=CPU)
            deadline = time.monotonic() + SECONDS
            while max(losses(run), default=0) < FAULT_STEP and time.monotonic() < deadline:
                time.sleep(0.1)
            tell(hosts)
            try:
                found: int | None = process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                found = None
            said = log.read_text(errors="replace")
            ending = Ending(f"saved, the launcher's code is {found}")
            ending.expect(found == code, f"code {found}: {said[-1500:]}")
            left = hosts.left_over(_SECONDS_TO_LEAVE)  # each host has its own launcher
            # On the console it need not be: deepspeed ends pdsh before the ranks.
            ending.expect(RunFolder(run).interruption() is not None, f"it has not ended by saving: {said[-1500:]}")
            ending.expect(not left, f"left running: {left}")
            if everywhere:
                hosts.start(2, words, log=hosts.folder / "second.txt", env=CPU)
            again = hosts.run(1, words, env=CPU, seconds=SECONDS)
            ending.expect(again.returncode == 0, f"started again: code {again.returncode}: {last_words(again)}")
            ending.expect(losses(run) == lab.reference(2, _STEPS), "other losses than on one machine")
            return ending

    return play


def _to(host: int, *containing: str) -> Callable[[Hosts], None]:
    """SIGTERM to the processes of a host in whose line one of these texts is found."""

    def tell(hosts: Hosts) -> None:
        for pid, line in hosts.processes(host).items():
            if any(text in line for text in containing):
                os.kill(pid, signal.SIGTERM)

    return tell


def _to_a_rank(hosts: Hosts) -> None:
    os.kill(min(hosts.ranks(2)), signal.SIGTERM)  # what a rank has started is younger


def _kept(name: str, what: str, play: Callable[[Lab], Ending], programs: Sequence[str] = ()) -> Case:
    return Case(name, "fault", what, play, programs=programs)


def _bare(
    name: str,
    what: str,
    command: Command,
    tell: Callable[[Hosts], None],
    code: int,
    *,
    everywhere: bool = False,
    programs: Sequence[str] = (),
) -> Case:
    slurm = programs == SLURM_PROGRAMS
    play = launcher_told_to_end(name, command, tell, code=code, slurm=slurm, everywhere=everywhere)
    return Case(name, "fault", what, play, programs=programs)


PREEMPTIONS = [
    _kept(
        "sigterm_host",
        "SIGTERM to every process of a host (preemption)",
        told_to_end("sigterm_host", lambda run: run.kill(2, signal.SIGTERM, "cluster.agent", "pretrain.py")),
    ),
    _kept(
        "sigterm_supervisor",
        "SIGTERM to keep_running",
        told_to_end("sigterm_supervisor", lambda run: run.kill(1, signal.SIGTERM, "keep_running.py")),
    ),
    _kept(
        "slurm_signal",
        "`srun keep_running`, a task per host, and Slurm's signal before the time is up",
        told_to_end(
            "slurm_signal",
            lambda run: run.hosts.do(1, "scancel --signal=USR1 $(squeue -h -o %A)"),
            "SIGUSR1",
            by_srun=True,
        ),
        programs=SLURM_PROGRAMS,
    ),
    _kept(
        "sigterm_rank",
        "SIGTERM to a rank alone",
        told_to_end("sigterm_rank", lambda run: os.kill(run.rank_processes(2)[0], signal.SIGTERM)),
    ),
    _bare(
        "sigterm_rank_bare",
        "`deepspeed --hostfile`: SIGTERM to a rank alone",
        deepspeed(),
        _to_a_rank,
        75,
        programs=["pdsh"],
    ),
    _bare(
        "sigterm_deepspeed",
        "`deepspeed --hostfile`: SIGTERM to it",
        deepspeed(),
        _to(1, "bin/deepspeed"),
        1,
        programs=["pdsh"],
    ),
    _bare(
        "sigterm_deepspeed_host",
        "`deepspeed --hostfile`: SIGTERM to what it has started on a host",
        deepspeed(),
        _to(2, "launcher.launch"),
        75,
        programs=["pdsh"],
    ),
    _bare(
        "sigterm_torchrun",
        "`launch/torchrun.sh`: SIGTERM to torchrun on a host",
        script("torchrun.sh", FIRST="host1", HOSTS="2", RANKS="1"),
        _to(2, "bin/torchrun"),
        1,
        everywhere=True,
    ),
    _bare(
        "sigterm_mpirun",
        "PyPI's `mpirun`: SIGTERM to it",
        mpirun(f"{BIN}/mpirun"),
        _to(1, "mpirun"),
        1,
    ),
    _bare(
        "scancel",
        "`srun` with a task per rank: `scancel`",
        srun(f"{BIN}/python"),
        lambda hosts: hosts.do(1, "scancel $(squeue -h -o %A)"),
        75,
        programs=SLURM_PROGRAMS,
    ),
]
