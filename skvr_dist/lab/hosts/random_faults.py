"""Ten faults of mixed kinds, at random moments of one run over three hosts, which must come to its end by itself."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

from skvr_dist.lab.hosts.case import Case, Ending, Lab
from skvr_dist.lab.hosts.kept_run import KeptRun

FAULTS, SEED = 10, 0
STEPS = 1000
# Left in peace: ranks train on for seconds until it is noticed that their agent stands still, some 20 steps in each.
_LAST_STEPS = 300
_SECONDS_AWAY = 25.0
"""Until a host is back: longer than the patience of the supervisor, so that one attempt goes without it."""


def _to_rank(number: int) -> Callable[[KeptRun, int], None]:
    def fault(run: KeptRun, host: int) -> None:
        for pid in run.rank_processes(host):
            os.kill(pid, number)

    return fault


def _power_off(run: KeptRun, host: int) -> None:
    run.hosts.power_off(host)
    _later(lambda: run.hosts.power_on(host))


def _cut(run: KeptRun, host: int) -> None:
    run.hosts.link(host, up=False)
    _later(lambda: run.hosts.link(host, up=True))


def _stop_agent(run: KeptRun, host: int) -> None:
    run.kill(host, signal.SIGSTOP, "cluster.agent")
    _later(lambda: run.kill(host, signal.SIGCONT, "cluster.agent"))


KINDS: dict[str, tuple[Callable[[KeptRun, int], None], tuple[int, ...]]] = {
    "SIGKILL of a rank": (_to_rank(signal.SIGKILL), (1, 2, 3)),
    "SIGSTOP of a rank": (_to_rank(signal.SIGSTOP), (1, 2, 3)),
    "SIGKILL of an agent": (lambda run, host: run.kill(host, signal.SIGKILL, "cluster.agent"), (1, 2, 3)),
    "SIGSTOP of an agent": (_stop_agent, (2, 3)),
    "SIGKILL of a whole host": (lambda run, host: run.hosts.kill_all(host), (2, 3)),
    "power off": (_power_off, (2, 3)),
    "link cut": (_cut, (2, 3)),
}
"""What is done, and to which hosts: the first one's end is the run's, which whoever started it starts again."""
_OF_THE_FIRST = "SIGKILL of a rank"
"""What comes instead while the others are away: the attempt after it takes them in again."""


def ten_random_faults(lab: Lab) -> Ending:
    """Each comes at its step, once the run trains after the one before."""
    draw = random.Random(SEED)
    kinds = [*KINDS, *draw.choices(list(KINDS), k=FAULTS - len(KINDS))]
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(5, STEPS - _LAST_STEPS), FAULTS))
    done: Counter[str] = Counter()
    with lab.hosts(3) as hosts:
        run = KeptRun(lab, hosts, "random_faults", {"train__steps": STEPS, "checkpoint__keep_last": STEPS})
        for kind, moment in zip(kinds, moments, strict=True):
            run.wait_for_step(moment)
            there = [host for host in hosts.all if hosts.is_up(host) and run.rank_processes(host)]
            if not set(KINDS[kind][1]) & set(there):
                kind = _OF_THE_FIRST
            fault, places = KINDS[kind]
            fault(run, draw.choice([host for host in places if host in there]))
            done[kind] += 1
            run.mark()
            if run.seconds_until_trained() is None:
                break
        kinds_done = ", ".join(f"{count} x {kind}" for kind, count in done.items())
        ending = Ending(f"ended by itself after {kinds_done}")
        ending.expect(sum(done.values()) == FAULTS, f"only {sum(done.values())} faults")
        run.expect_ended(ending)
        # Two replicas add gradients up in another order than three, and hundreds of steps make that grow: losses of two
        # undisturbed runs, on three ranks and on two, are 5e-2 apart at step 600. So the other run changes, too.
        run.expect_losses(run.undisturbed(lab), ending, bound=0.0)
        ending.found += "; losses to the bit those of a run without faults on as many ranks at each step"
        return ending


def _later(action: Callable[[], None]) -> None:
    def wait_and_act() -> None:
        time.sleep(_SECONDS_AWAY)
        action()
        threading.Event().wait()  # for ever: a host that this thread has started ends with it

    threading.Thread(target=wait_and_act, daemon=True).start()


RANDOM_FAULTS = Case(
    "random_faults", "fault", f"{FAULTS} random faults in one run over 3 hosts (seed {SEED})", ten_random_faults
)
