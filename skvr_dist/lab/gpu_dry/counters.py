"""What the runtime that runs nothing was asked for, and where the host waited."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from skvr_dist.parallel.engine.stopwatch import Stopwatch

ROOM_FOR_COUNTERS = 1 << 18
_OURS, _DEEPSPEED = "skvr_dist", "deepspeed"
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Wait:
    """A line that waits for the device."""

    where: str
    """File from its package on, and line."""
    package: str
    """Whose line it is."""
    called_from: str
    """The line of this project that led there."""
    in_update: bool
    """Whether it is part of the optimizer step, and not of a micro-batch."""
    times: int = 1


@dataclass
class Counts:
    """Of some lines of Python."""

    launches: int = 0
    """Kernels, those of libraries but cuBLAS' among them."""
    triton_launches: int = 0
    """Those of them that Triton compiled."""
    products: int = 0
    """Calls of cuBLAS that multiply matrices."""
    copies_to_device: int = 0
    copies_to_host: int = 0
    waits: int = 0
    """Calls that wait for the device, for a stream or for an event."""
    waiting: list[Wait] = field(default_factory=list)
    """Where, as far as PyTorch warns of it."""


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what is asked of the device within; what is yielded is filled at the end."""
    found, counts, seen = Counts(), _Library(), Counter[tuple[str, str, str, bool]]()

    def note(message: Warning | str, *_: object) -> None:
        if "synchroniz" in str(message) and "prototype" not in str(message):
            seen[_place()] += 1

    counts.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    numbers = counts.read()
    found.launches, found.triton_launches = numbers["launches"], numbers["launches of Triton's"]
    found.products = numbers["products"]
    found.copies_to_device, found.copies_to_host = numbers["copies to device"], numbers["copies to host"]
    found.waits = sum(numbers[name] for name in _WAITS)
    found.waiting = [Wait(*place, times) for place, times in sorted(seen.items())]


def _place() -> tuple[str, str, str, bool]:
    """Where the host waits: the fields of `Wait` but its times."""
    stack = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, warnings.__file__)]
    frames = [frame for frame in stack if _package(frame.filename) != "torch"]
    ours = [frame for frame in frames if _package(frame.filename) == _OURS and "/lab/" not in frame.filename]
    names = {frame.name for frame in stack}
    # Backward passes have threads of their own, which know nothing of the engine.
    after_step = threading.current_thread() is threading.main_thread() and "train_step" not in names
    in_update = after_step or "_exec_optimizer_step" in names
    here = frames[-1]
    return _short(here), _package(here.filename), _short(ours[-1]) if ours else "", in_update


def _package(file: str) -> str:
    parts = Path(file).parts
    return next((name for name in ("torch", _DEEPSPEED, _OURS) if name in parts), "other")


def _short(frame: traceback.FrameSummary) -> str:
    parts = Path(frame.filename).parts
    name = _package(frame.filename)
    start = parts.index(name) if name in parts else -1
    return f"{'/'.join(parts[start:])}:{frame.lineno}"


class LaunchesByPart(Stopwatch):
    """A stopwatch that counts launches as well, in the same parts of a step."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = _Library()
        self.launches: Counter[str] = Counter()

    @contextlib.contextmanager
    def watching(self, kind: Any) -> Iterator[None]:
        """Time an instruction, and count."""
        before = self._counts.read()["launches"]
        with super().watching(kind):
            yield
        self.launches[kind.__name__] += self._counts.read()["launches"] - before

    def clear(self) -> None:
        """Start again from nothing."""
        super().clear()
        self.launches = Counter()


class _Library:
    """The counters of the library that is preloaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"].split(":")[0])

    def reset(self) -> None:
        self._library.dry_reset()

    def read(self) -> Counter[str]:
        """Counts by name; 0 of what is not there."""
        text = ctypes.create_string_buffer(ROOM_FOR_COUNTERS)
        self._library.dry_counters(text, ROOM_FOR_COUNTERS)
        lines = text.value.decode().splitlines()
        return Counter({name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)})
