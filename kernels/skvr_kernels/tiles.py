"""How large the tiles of each kernel are, by the generation of the GPU, the head size and the dtype.

Not searched for when a run starts: ranks would choose differently, and with other tiles sums have other bits. Those of
compute capability 9.0 at head size 128 are the fastest of some that were timed on an H100 with Qwen3-1.7B's heads and
4,096 positions (bf16, PyTorch 2.11, Triton 3.6); the others have not been timed. What they compile to is looked at by
`tools/verify.py kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kernel = Literal["forward", "queries", "keys", "write", "unwrite"]


@dataclass(frozen=True)
class Tiles:
    """Of one kernel."""

    queries: int
    """Rows of queries; of the kernels that write, rows of keys."""
    keys: int
    warps: int
    stages: int
    """Loads of tiles that are under way at once."""
    stack_bytes: int = 0
    """What a thread may spill of its registers."""


SMALLEST = Tiles(16, 16, 4, 1)
"""The smallest that a product of matrices takes: for Triton's interpreter, so that small shapes have many tiles."""


def tiles_for(kernel: Kernel, capability: int, head_size: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a kernel.

    Args:
        capability: of the GPU, such as 80 or 90.
    """
    if kernel in ("write", "unwrite"):
        return Tiles(max(16, _power_of_two_within(4096 // head_size)), 0, 4, 1)
    if dtype == torch.float32:  # products in three parts of TF32 take three times the registers
        spilt = 64 if kernel == "queries" and capability >= 120 else 0  # 48 at head size 128
        return Tiles(32, 16 if head_size > 64 else 32, 8, 1, spilt)
    is_small = _has_little_shared_memory(capability)
    if head_size > 128:
        if kernel == "keys":
            return Tiles(32 if is_small else 64, 32, 8, 1)
        return Tiles(64, 32, 8, 1 if is_small else 2)
    if capability >= 90 and not is_small:
        # With 8 warps for keys nothing spills, and a backward pass takes 1.4 times as long.
        return {
            "forward": Tiles(64, 64, 4, 3),
            "queries": Tiles(128, 64, 8, 3),
            "keys": Tiles(64, 64, 4, 2, stack_bytes=224),
        }[kernel]
    return {"forward": Tiles(128, 32, 8, 2), "queries": Tiles(64, 64, 8, 2), "keys": Tiles(64, 64, 8, 2)}[kernel]


def _has_little_shared_memory(capability: int) -> bool:
    """Whether a program has 99 KiB: cards for workstations and games of every generation, 8.6, 8.9 and 12."""
    return capability in (86, 89) or capability >= 120


def _power_of_two_within(number: int) -> int:
    """The largest that is not above a number of 1 or more."""
    return 1 << (number.bit_length() - 1)
