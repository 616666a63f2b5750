"""What ranks take, by stage; and that the stopwatch waits for no device."""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe import schedule

from skvr_dist.parallel.engine import stopwatch as stopwatch_module
from skvr_dist.parallel.engine.stopwatch import Stopwatch
from skvr_dist.train.usage import by_stage


def test_stages_have_the_largest_memory_and_the_mean_time_of_their_ranks() -> None:
    found = by_stage(["memory/x", "time/x"], [0, 0, 1], [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)])
    assert found == {"memory/x/stage_0": 3.0, "time/x/stage_0": 3.0, "memory/x/stage_1": 5.0, "time/x/stage_1": 6.0}


class Device:
    """A GPU's clock that stands still until somebody waits, and its events."""

    waited = 0

    def __init__(self) -> None:
        self.now = 0

    def device_name(self) -> str:
        return "cuda"

    def Event(self, enable_timing: bool) -> Event:  # noqa: N802, as the accelerator calls it
        return Event(self)


class Event:
    """Half a second after the one before."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.is_done = False

    def record(self) -> None:
        self.device.now += 1
        self.at = self.device.now

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.device.waited += 1
        self.is_done = True

    def elapsed_time(self, last: Event) -> float:
        return 500.0 * (last.at - self.at)


def test_no_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(stopwatch_module, "get_accelerator", lambda: device)
    stopwatch = Stopwatch()
    for kind in (schedule.ForwardPass, schedule.BackwardPass, schedule.SendGrad, schedule.OptimizerStep):
        with stopwatch.watching(kind):
            pass
    for part, _, last in stopwatch._events:
        last.is_done = part == "forward"  # as where the host has seen the loss
    own, _ = stopwatch.read()
    assert own == 0.5 and device.waited == 0
    assert (stopwatch.parts["forward"], stopwatch.parts["optimizer"]) == (0.5, 0.0)
    for _, _, last in stopwatch._late:
        last.is_done = True
    stopwatch.clear()  # a step later
    assert stopwatch.read()[0] == 0.0 and device.waited == 0
    late = dict.fromkeys(("backward", "exchange", "optimizer"), 0.5)
    assert {part: seconds for part, seconds in stopwatch.parts.items() if seconds} == late
