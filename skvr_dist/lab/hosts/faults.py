"""What clusters do to a run: hosts vanish, links are cut, ranks stand still. Each is a row of the table of faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from skvr_dist.lab.hosts.case import Case, Ending, Lab
from skvr_dist.lab.hosts.kept_run import FAULT_STEP, SHELL, TIMEOUT_SECONDS, KeptRun

SECONDS_TO_NAME = TIMEOUT_SECONDS + 10
"""The longest time until host and rank are named."""
SECONDS_TO_TRAIN = 60.0
"""The longest time until a step is done again."""


def survives(
    name: str, fault: Callable[[KeptRun], None], named: str, *, lost: bool, number: int = 3
) -> Callable[[Lab], Ending]:
    """A case: a fault on the last host, which must be named and survived.

    Args:
        fault: what is done to it.
        named: what the console must say, as a regular expression.
        lost: whether the host is gone then, so that the run goes on with one replica less.
    """

    def play(lab: Lab) -> Ending:
        with lab.hosts(number) as hosts:
            run = KeptRun(lab, hosts, name)
            run.wait_for_step(FAULT_STEP)
            run.mark()
            fault(run)
            told = run.seconds_until_said(named)
            again = run.seconds_until_trained()
            ending = Ending(f"named after {_in_seconds(told)}, trains again after {_in_seconds(again)}")
            ending.expect(told is not None and told <= SECONDS_TO_NAME, f"`{named}` said after {_in_seconds(told)}")
            ending.expect(again is not None and again <= SECONDS_TO_TRAIN, f"trains after {_in_seconds(again)}")
            if lost:
                left_out = f"left out: host{number}"
                ending.expect(left_out in run.console(), f"does not say {left_out}")
                quiet = run.seconds_until_quiet(number)
                ending.expect(quiet is not None, f"still on host{number}: {hosts.left_over()}")
            run.expect_finished(lab, ending, same_ranks=not lost)
            return ending

    return play


def first_vanishes(lab: Lab) -> Ending:
    """The others end in time, with code 75; started again, the run goes on."""
    with lab.hosts(3) as hosts:
        run = KeptRun(lab, hosts, "first_vanishes")
        run.wait_for_step(FAULT_STEP)
        # Their agents' own words go to the ssh of the first host, so they are asked as a batch system would: by srun's
        # way of starting, a command per host, in `batch_system_starts`. Here: nothing may be left.
        run.mark()
        hosts.power_off(1)
        quiet = run.seconds_until_quiet(2, 3, limit=SECONDS_TO_NAME + 5)
        ending = Ending(f"all others ended after {_in_seconds(quiet)}; started again, it trained to its end")
        ending.expect(quiet is not None and quiet <= SECONDS_TO_NAME, f"others ended after {_in_seconds(quiet)}")
        hosts.power_on(1)
        time.sleep(1)  # its sshd
        run.start()
        run.expect_finished(lab, ending)
        return ending


def sigterm(name: str, send: Callable[[KeptRun], None]) -> Callable[[Lab], Ending]:
    """A case: somebody is told to end; all save first, the code is 75, and the same command goes on."""

    def play(lab: Lab) -> Ending:
        with lab.hosts(2) as hosts:
            run = KeptRun(lab, hosts, name)
            run.wait_for_step(FAULT_STEP)
            run.mark()
            send(run)
            code = run.code()
            ending = Ending(f"saved, code {code}")
            ending.expect(code == 75, f"code {code}: {run.console()[-1500:]}")
            ending.expect("which is saved" in run.console(), "nobody says that it is saved")
            ending.expect("not started again after SIGTERM" in run.console(), "does not say why it ended")
            quiet = run.seconds_until_quiet(1, 2, limit=5)
            ending.expect(quiet is not None, f"left running: {hosts.left_over()}")
            run.start()
            run.expect_finished(lab, ending)
            return ending

    return play


def launcher_dies(lab: Lab) -> Ending:
    """SIGKILL to the supervisor while the console is quiet: its ranks end on all hosts, and it can be started again."""
    with lab.hosts(2) as hosts:
        run = KeptRun(lab, hosts, "launcher_dies", {"train__log_every_steps": 1000, "checkpoint__every_steps": 1000})
        run.seconds_until(lambda: bool(run.rank_processes(2)) and run.has_step(FAULT_STEP), "a step", must=True)
        run.mark()
        run.process.kill()  # the way in
        run.kill(1, signal.SIGKILL, "keep_running.py")
        quiet = run.seconds_until_quiet(1, 2)
        ending = Ending(f"no process left on any host after {_in_seconds(quiet)}; started again, it trained to its end")
        ending.expect(quiet is not None and quiet <= SECONDS_TO_NAME, f"left: {hosts.left_over()}")
        run.start()
        run.expect_finished(lab, ending)
        return ending


def second_start(lab: Lab) -> Ending:
    """The same command, and the ranks of the run by hand, beside a run that lives: refused, and it goes on."""
    with lab.hosts(2) as hosts:
        run = KeptRun(lab, hosts, "second_start")
        run.wait_for_step(FAULT_STEP)
        second = hosts.run(1, run.command(), env=SHELL)
        ending = Ending(f"refused with code {second.returncode}")
        said = "is kept running by process"
        ending.expect(second.returncode == 2, f"code {second.returncode}: {second.stderr[-1000:]}")
        ending.expect(said in second.stderr, f"does not say `{said}`: {second.stderr[-1000:]}")
        run.expect_finished(lab, ending)
        ending.expect("attempt 2" not in run.console(), "the first was disturbed")
        return ending


def _in_seconds(seconds: float | None) -> str:
    return "no time" if seconds is None else f"{seconds:.0f} s"


def _kill_rank(run: KeptRun) -> None:
    os.kill(run.rank_processes(3)[0], signal.SIGKILL)


def _stop_rank(run: KeptRun) -> None:
    os.kill(run.rank_processes(3)[0], signal.SIGSTOP)


def _stop_agent(run: KeptRun) -> None:
    run.kill(3, signal.SIGSTOP, "cluster.agent")


def _fault(name: str, what: str, play: Callable[[Lab], Ending], **more: Any) -> Case:
    return Case(name, "fault", what, play, **more)


_OFF = r"host3 is lost, with rank 2: no sign of life"

FAULTS: list[Case] = [
    _fault(
        "kill_rank",
        "SIGKILL of a rank",
        survives("kill_rank", _kill_rank, r"rank 2 on host3 ended with SIGKILL", lost=False),
    ),
    _fault(
        "stop_rank",
        "SIGSTOP of a rank",
        survives("stop_rank", _stop_rank, r"no sign of life from .*rank 2", lost=False),
    ),
    _fault(
        "kill_host",
        "SIGKILL of everything on a host",
        survives("kill_host", lambda run: run.hosts.kill_all(3), r"host3 is lost, with rank 2", lost=False),
    ),
    _fault(
        "power_off",
        "a host loses power",
        survives("power_off", lambda run: run.hosts.power_off(3), _OFF, lost=True),
        quick=True,
    ),
    _fault(
        "cut_link",
        "the cable of a host is cut, for good",
        survives("cut_link", lambda run: run.hosts.link(3, up=False), _OFF, lost=True),
    ),
    _fault("stop_agent", "SIGSTOP of the agent of a host", survives("stop_agent", _stop_agent, _OFF, lost=False)),
    _fault("first_vanishes", "the first host loses power", first_vanishes),
    _fault(
        "sigterm_host",
        "SIGTERM to every process of a host (preemption)",
        sigterm("sigterm_host", lambda run: run.kill(2, signal.SIGTERM, "cluster.agent", "pretrain.py")),
    ),
    _fault(
        "sigterm_supervisor",
        "SIGTERM to keep_running",
        sigterm("sigterm_supervisor", lambda run: run.kill(1, signal.SIGTERM, "keep_running.py")),
    ),
    _fault("launcher_dies", "SIGKILL of keep_running, the console quiet", launcher_dies),
    _fault("second_start", "the same command on the same folder while it trains", second_start),
]
