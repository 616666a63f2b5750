"""How long a rank's own part of a step takes, and how long it is busy with other ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule

# Neither waits for another rank, unless it shares its layers with others (tensor parallelism, ZeRO-3).
_OWN = (schedule.LoadMicroBatch, schedule.ForwardPass)
_SHARED = (
    schedule.RecvActivation,
    schedule.RecvGrad,
    schedule.ReduceGrads,
    schedule.ReduceTiedGrads,
    schedule.OptimizerStep,
)


class Stopwatch:
    """Sums over the instructions of a step: of the device's own clock for work on GPUs, else of the host's."""

    def __init__(self) -> None:
        self._own = self._shared = 0.0
        self._is_on_gpu = get_accelerator().device_name() == "cuda"
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def watching(self, kind: type[schedule.PipeInstruction]) -> Iterator[None]:
        """Time an instruction."""
        if self._is_on_gpu and issubclass(kind, _OWN):
            first, last = (get_accelerator().Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if issubclass(kind, _OWN):
            self._own += seconds
        elif issubclass(kind, _SHARED):
            self._shared += seconds

    def read(self) -> tuple[float, float]:
        """Seconds of this rank's own part, and of what it does with others, since it was cleared; once."""
        for first, last in self._events:
            last.synchronize()
            self._own += first.elapsed_time(last) / 1000
        return self._own, self._shared

    def clear(self) -> None:
        """Start again from nothing."""
        self._own = self._shared = 0.0
        self._events.clear()
