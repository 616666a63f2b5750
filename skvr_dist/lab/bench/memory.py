"""Peak memory of a piece of work, the limit that it may not pass, and the largest batch below that limit.

On a GPU this is the memory of PyTorch's allocator, on a CPU what the process holds in RAM (`VmHWM` of Linux), which its
libraries are part of.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from skvr_dist.errors import UserError

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # man 5 proc: sets VmHWM to what is resident now


def reset_peak(device: torch.device) -> None:
    """Count the peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text(_RESET_PEAK)


def peak_bytes(device: torch.device) -> int | None:
    """The peak since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") if _CLEAR.exists() else None


def _resident(what: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def give_back(device: torch.device) -> None:
    """Return what a GPU's allocator keeps for later; a limit counts it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


@contextmanager
def limited(device: torch.device, limit: int) -> Iterator[None]:
    """Let allocations fail that would pass a limit in bytes, so that the machine itself is not driven out of memory.

    Raises:
        UserError: the process holds more already, or the system tells nothing of it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    room = room_on_cpu(limit)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_resident("VmData") + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def room_on_cpu(limit: int) -> int:
    """Bytes that the process may still take in RAM below a limit.

    Raises:
        UserError: it holds more already, or the system tells nothing of it.
    """
    if not _CLEAR.exists():
        raise UserError(f"the largest batch on a CPU needs Linux's {_CLEAR}, which is not here; leave out --memory-gib")
    held = _resident("VmRSS")
    if held >= limit:
        raise UserError(
            f"--memory-gib {limit / 2**30:g} is less than the {held / 2**30:.2f} that the process holds with the model "
            f"alone; give more"
        )
    return limit - held


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, by doubling and then bisecting; 0 if not even 1 does.

    Args:
        fits: whether a number fits; where one does not, no larger one does.
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
