"""What clusters do to a run: hosts vanish, links are cut, ranks stand still. Each is a row of the table of faults."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from skvr_dist.lab.hosts.case import Case, Ending, Lab, losses
from skvr_dist.lab.hosts.kept_run import FAULT_STEP, KEYS, SHELL, STEPS, TIMEOUT_SECONDS, KeptRun
from skvr_dist.lab.hosts.preemptions import PREEMPTIONS
from skvr_dist.lab.hosts.random_faults import RANDOM_FAULTS
from skvr_dist.run.folder import RunFolder

SECONDS_TO_NAME = TIMEOUT_SECONDS + 10
"""The longest time until host and rank are named."""
_MANY_STEPS = 400  # of the small model, some 20 a second
_SECONDS_TO_EXIT = 60.0  # for Python to take down what it has built, on a busy machine
SECONDS_TO_TRAIN = 60.0
"""The longest time until a step is done again."""


def survives(
    name: str,
    fault: Callable[[KeptRun], None],
    named: str,
    *,
    lost: bool,
    number: int = 3,
    same_ranks: bool | None = None,
    steps: int = STEPS,
) -> Callable[[Lab], Ending]:
    """A case: a fault on the last host, which must be named and survived.

    Args:
        fault: what is done to it.
        named: what the console must say, as a regular expression.
        lost: whether the host is gone then, so that the run goes on with one replica less.
        same_ranks: whether all steps are done by as many; None: if the host is not lost.
        steps: of the run, more where it goes on until the fault is noticed.
    """

    def play(lab: Lab) -> Ending:
        with lab.hosts(number) as hosts:
            run = KeptRun(lab, hosts, name, {"train__steps": steps})
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
            run.expect_finished(lab, ending, same_ranks=not lost if same_ranks is None else same_ranks)
            return ending

    return play


# Its ranks end when there are two of them.
STAND_IN = """
import os, pathlib, sys, time
run = pathlib.Path(sys.argv[1])
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text("train: {steps: 4}")
print("step 12/40  loss 1.0", flush=True)
while os.environ["WORLD_SIZE"] == "3":
    time.sleep(0.1)
(run / "checkpoints/step-00000004").mkdir(parents=True, exist_ok=True)
"""


def power_off_of_stand_ins(lab: Lab) -> Ending:
    """A host that loses power is left out; ranks are played by a script, so that it takes seconds."""
    with lab.hosts(3) as hosts:
        script = hosts.folder / "pretrain_played.py"
        script.write_text(STAND_IN)
        run = KeptRun(lab, hosts, "stand_ins", stand_in=script)
        run.wait_for_step(FAULT_STEP)
        run.seconds_until(lambda: all(map(run.rank_processes, hosts.all)), "three ranks", must=True)
        run.mark()
        hosts.power_off(3)
        told, code = run.seconds_until_said(_OFF), run.code()
        ending = Ending(f"named after {_in_seconds(told)}")
        ending.expect(told is not None and told <= SECONDS_TO_NAME, f"`{_OFF}` said after {_in_seconds(told)}")
        ending.expect(code == 0 and "left out: host3" in run.console(), f"code {code}: {run.console()[-1500:]}")
        ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
        return ending


def first_vanishes(lab: Lab) -> Ending:
    """The others end in time, with code 75 and its name; started again, as a batch system does, the run goes on."""
    with lab.hosts(3) as hosts:
        run = KeptRun(lab, hosts, "first_vanishes", started_by="batch")
        run.wait_for_step(FAULT_STEP)
        run.mark()
        hosts.power_off(1)
        quiet = run.seconds_until_quiet(2, 3, limit=SECONDS_TO_NAME + 5)
        ending = Ending(f"all others ended after {_in_seconds(quiet)} with code 75; started again, it went on")
        ending.expect(quiet is not None and quiet <= SECONDS_TO_NAME, f"others ended after {_in_seconds(quiet)}")
        for host in (2, 3):
            code, said = run.processes[host].poll(), run.console_of(host)
            ending.expect(code == 75, f"code {code} on host{host}: {said[-800:]}")
            ending.expect("the supervisor on host1 gave no sign of life" in said, f"host{host}: {said[-800:]}")
        hosts.power_on(1)
        run.start()
        run.expect_finished(lab, ending)
        return ending


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
        run = KeptRun(lab, hosts, "second_start", {"train__steps": _MANY_STEPS})
        run.wait_for_step(FAULT_STEP)
        second = hosts.run(1, run.command(), env=SHELL)
        ending = Ending(f"refused with code {second.returncode}")
        said = "is kept running by process"
        ending.expect(second.returncode == 2, f"code {second.returncode}: {second.stderr[-1000:]}")
        ending.expect(said in second.stderr, f"does not say `{said}`: {second.stderr[-1000:]}")
        run.expect_finished(lab, ending)
        ending.expect("attempt 2" not in run.console(), "the first was disturbed")
        return ending


def cut_link_briefly(lab: Lab) -> Ending:
    """A link that is cut for less than the patience lasts disturbs nothing."""
    with lab.hosts(2) as hosts:
        run = KeptRun(lab, hosts, "cut_link_briefly")
        run.wait_for_step(FAULT_STEP)
        hosts.link(2, up=False)
        time.sleep(2)
        hosts.link(2, up=True)
        ending = Ending("goes on in the same attempt")
        run.expect_finished(lab, ending)
        ending.expect("attempt 2" not in run.console(), "was started again")
        return ending


def cut_link_of_bare_ranks(lab: Lab) -> Ending:
    """Ranks that nobody watches, as a launcher leaves them: those behind the cut end by themselves, too."""
    with lab.hosts(2) as hosts:
        run = lab.run_folder("bare_ranks")
        command = ["python", "launch/pretrain.py", *lab.arguments(run, **{**KEYS, "train__steps": 10_000})]
        meeting = {"MASTER_ADDR": "host1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        logs = {host: hosts.folder / f"rank-{host}.txt" for host in hosts.all}
        ranks = {
            host: hosts.start(host, command, log=logs[host], env={**SHELL, **meeting, "RANK": str(host - 1)})
            for host in hosts.all
        }
        deadline = time.monotonic() + 120
        while max(losses(run), default=0) < FAULT_STEP and time.monotonic() < deadline:
            time.sleep(0.1)
        started = time.monotonic()
        hosts.link(2, up=False)
        silent = {host: f"no sign of life from rank {2 - host} on host host{3 - host}" for host in hosts.all}
        named: dict[int, float] = {}
        while len(named) < 2 and time.monotonic() < started + SECONDS_TO_NAME + 5:
            time.sleep(0.1)
            now = time.monotonic() - started
            named = {host: now for host in hosts.all if silent[host] in logs[host].read_text()} | named
        ending = Ending(f"each names the other after {_in_seconds(max(named.values(), default=None))}, and ends")
        for host, process in ranks.items():
            took = named.get(host)
            ending.expect(took is not None and took <= SECONDS_TO_NAME, f"host{host} names after {_in_seconds(took)}")
            try:
                code: int | None = process.wait(_SECONDS_TO_EXIT)
            except subprocess.TimeoutExpired:
                code = None
            ending.expect(code == 75, f"rank {host - 1} on host{host}: code {code}: {logs[host].read_text()[-800:]}")
        return ending


def slow(name: str, make_slow: Callable[[KeptRun], None], named: str) -> Callable[[Lab], Ending]:
    """A case: something makes the others wait, and is named while the run goes on."""

    def play(lab: Lab) -> Ending:
        with lab.hosts(3) as hosts:
            run = KeptRun(lab, hosts, name, {"train__watch_ranks_every_steps": 5, "train__steps": 10_000})
            run.wait_for_step(FAULT_STEP)
            run.mark()
            make_slow(run)
            told = run.seconds_until_said(named)
            ending = Ending(f"named after {_in_seconds(told)}")
            ending.expect(told is not None, f"`{named}` is never said: {run.console()[-1500:]}")
            wrong = [line for line in run.console().splitlines() if "slow:" in line and not re.search(named, line)]
            ending.found += f"; {len(wrong)} other lines on slow ranks or links"
            record = next(r for r in reversed(RunFolder(run.folder).metric_records()) if "ranks/own_seconds/host3" in r)
            tags = {f"ranks/{what}/host2" for what in ("own_seconds", "wait_seconds", "link_seconds")}
            ending.expect(tags <= set(record), f"not among the metrics: {tags - set(record)}")
            return ending

    return play


def _throttle(run: KeptRun) -> None:
    """Leave the rank of host 2 a fifth of its time, as a quota of a control group does, while it lives."""
    (rank,) = run.rank_processes(2)
    script = f"while kill -STOP {rank}; do sleep 0.08; kill -CONT {rank}; sleep 0.02; done"
    subprocess.Popen(["sh", "-c", script], stderr=subprocess.DEVNULL)


def _in_seconds(seconds: float | None) -> str:
    return "no time" if seconds is None else f"{seconds:.0f} s"


def _kill_rank(run: KeptRun) -> None:
    os.kill(run.rank_processes(run.hosts.number)[0], signal.SIGKILL)


def _stop_rank(run: KeptRun) -> None:
    os.kill(run.rank_processes(run.hosts.number)[0], signal.SIGSTOP)


def _stop_agent(run: KeptRun) -> None:
    run.kill(3, signal.SIGSTOP, "cluster.agent")


def _fault(name: str, what: str, play: Callable[[Lab], Ending], **more: Any) -> Case:
    return Case(name, "fault", what, play, **more)


_OFF = r"host3 is lost, with rank 2: no sign of life"

FAULTS: list[Case] = [
    _fault(
        "kill_rank",
        "SIGKILL of a rank",
        survives("kill_rank", _kill_rank, r"rank 1 on host2 ended with SIGKILL", lost=False, number=2),
    ),
    _fault(
        "stop_rank",
        "SIGSTOP of a rank",
        survives("stop_rank", _stop_rank, r"no sign of life from rank 1 on host host2", lost=False, number=2),
    ),
    _fault(
        "kill_host",
        "SIGKILL of everything on a host",
        survives("kill_host", lambda run: run.hosts.kill_all(2), r"host2 is lost, with rank 1", lost=False, number=2),
    ),
    _fault(
        "power_off",
        "a host loses power",
        survives("power_off", lambda run: run.hosts.power_off(3), _OFF, lost=True),
    ),
    _fault("power_off_played", "the same, with a script in the place of ranks", power_off_of_stand_ins, quick=True),
    _fault(
        "cut_link",
        "the cable of a host is cut, for good",
        survives("cut_link", lambda run: run.hosts.link(3, up=False), _OFF, lost=True),
    ),
    _fault("cut_link_briefly", "the cable of a host is cut for 2 s", cut_link_briefly),
    _fault("cut_link_bare", "the cable is cut of ranks that nobody keeps running", cut_link_of_bare_ranks),
    _fault(
        "stop_agent",
        "SIGSTOP of the agent of a host",
        survives("stop_agent", _stop_agent, _OFF, lost=False, same_ranks=False, steps=_MANY_STEPS),
    ),
    _fault("first_vanishes", "the first host loses power", first_vanishes),
    *PREEMPTIONS,
    _fault("launcher_dies", "SIGKILL of keep_running, the console quiet", launcher_dies),
    _fault(
        "slow_rank",
        "a rank gets a fifth of a core's time",
        slow("slow_rank", _throttle, r"slow: rank 1 on host2 takes"),
    ),
    _fault(
        "slow_link",
        "the cable of a host carries 20 Mbit/s",
        slow("slow_link", lambda run: run.hosts.rate(2, "20mbit"), r"slow: the link of host2"),
    ),
    _fault("second_start", "the same command on the same folder while it trains", second_start),
    RANDOM_FAULTS,
]
