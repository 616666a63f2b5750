"""How long the parts of a step take on a rank: those it does by itself, and those it does with other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule

PARTS = ("load", "forward", "backward", "exchange", "reduce", "optimizer")
"""Reading a micro-batch, with the wait for it; the passes, in which ZeRO-2 and 3 reduce gradients and ZeRO-3 fetches
weights; sending to and receiving from other stages; adding gradients up over ranks; the norm and the update."""
_PART_OF = {
    schedule.LoadMicroBatch: "load",
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.SendActivation: "exchange",
    schedule.SendGrad: "exchange",
    schedule.RecvActivation: "exchange",
    schedule.RecvGrad: "exchange",
    schedule.ReduceGrads: "reduce",
    schedule.ReduceTiedGrads: "reduce",
    schedule.OptimizerStep: "optimizer",
}
# Neither waits for another rank, unless it shares its layers with others (tensor parallelism, ZeRO-3).
_OWN = ("load", "forward")
_SHARED = (
    schedule.RecvActivation,
    schedule.RecvGrad,
    schedule.ReduceGrads,
    schedule.ReduceTiedGrads,
    schedule.OptimizerStep,
)


class Stopwatch:
    """Sums over the instructions of a step: on GPUs of the device's own clock, which nobody waits for."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        """Seconds of each part, up to date after `read`. On GPUs the end of a step is counted in the next one if the
        device has not come to it yet."""
        self._shared = 0.0
        self._is_on_gpu = get_accelerator().device_name() == "cuda"
        self._events: list[tuple[str, Any, Any]] = []
        self._late: list[tuple[str, Any, Any]] = []  # of steps before

    @contextmanager
    def watching(self, kind: type[schedule.PipeInstruction]) -> Iterator[None]:
        """Time an instruction."""
        part = _PART_OF.get(kind)
        if part is None:
            yield
            return
        if self._is_on_gpu:
            first, last = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            first.record()
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if self._is_on_gpu:
            last.record()
            self._events.append((part, first, last))
        else:
            self.parts[part] += seconds
        if kind in _SHARED:
            self._shared += seconds

    def read(self) -> tuple[float, float]:
        """Seconds of this rank's own part, and (by the host's clock) of what it does with others, since `clear`; once.

        No device is waited for: the own part of a step is over when the host has seen its loss.
        """
        pending, self._late = [*self._late, *self._events], []
        self._events.clear()
        for part, first, last in pending:
            if not last.query():
                self._late.append((part, first, last))
                continue
            self.parts[part] += first.elapsed_time(last) / 1000
        return sum(self.parts[part] for part in _OWN), self._shared

    def clear(self) -> None:
        """Start again from nothing; what `read` has not seen is dropped."""
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._shared = 0.0
        self._events.clear()
