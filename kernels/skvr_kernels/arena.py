"""What the kernels work on: the arena of keys and values, and the documents that positions are confined to.

Shapes: B batch, S sequence, K key/value heads, E head size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from skvr_kernels.forward import forward_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_HEAD = 256
LARGEST_FP32_HEAD = 128


class Arena:
    """Room for the keys and values of a micro-batch's layers, and for their gradients: [slots, 2, B, S, K, E] each.

    Gradients are float32 and zero between two backward passes: whoever reads them sets them to zero again. So one arena
    of gradients serves all micro-batches that are under way at once.

    Args:
        slots: layers whose keys and values there is room for.
        gradients: those of another arena of the same shape, to be shared; None makes new ones.

    Raises:
        ValueError: no kernel can do this.
    """

    def __init__(
        self,
        slots: int,
        batch: int,
        sequence: int,
        kv_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        gradients: Tensor | None = None,
    ) -> None:
        require_possible(head_size, dtype, torch.device(device))
        shape = (slots, 2, batch, sequence, kv_heads, head_size)
        self.kv = torch.empty(shape, dtype=dtype, device=device)
        self.gradients = torch.zeros(shape, dtype=torch.float32, device=device) if gradients is None else gradients
        if self.gradients.shape != self.kv.shape or self.gradients.dtype != torch.float32:
            raise ValueError(
                f"the arena is {shape}, its gradients are {self.gradients.dtype} {tuple(self.gradients.shape)}; give "
                f"float32 ones of the same shape"
            )
        if is_debugging() and self.gradients.any():
            raise ValueError(
                "the gradients that this arena shares are not zero: a backward pass is under way, or one ended before "
                "it reached what was written (torch.autograd.grad of queries alone); call zero_() on them"
            )

    @property
    def slots(self) -> int:
        """Layers that there is room for."""
        return self.kv.shape[0]

    def require_slots(self, slot: Tensor) -> None:
        """Refuse a slot [B] that is none. Waits for the device: for debugging (`is_debugging`).

        Raises:
            ValueError: which one.
        """
        for b, number in enumerate(slot.tolist()):
            if not 0 <= number < self.slots:
                raise ValueError(f"sequence {b} has slot {number}, but the arena has slots 0 to {self.slots - 1}")


@dataclass(frozen=True, eq=False)
class Documents:
    """What each position is confined to; of shapes that do not depend on the number of documents."""

    first: Tensor
    """int32 [B, S], the first key that a query sees."""
    end: Tensor
    """int32 [B, S], one past the last query that sees a key."""

    @classmethod
    def joined(cls, batch: int, sequence: int, device: torch.device | str) -> Documents:
        """Every position sees all earlier ones."""
        first = torch.zeros(batch, sequence, dtype=torch.int32, device=device)
        return cls(first, torch.full_like(first, sequence))

    @classmethod
    def of(cls, numbers: Tensor) -> Documents:
        """From the document of each position, int [B, S], never falling within a sequence. Waits for no device."""
        batch, sequence = numbers.shape
        place = torch.arange(sequence, device=numbers.device).expand(batch, -1)
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        first = torch.where(begins, place, 0).cummax(1).values
        ends = torch.ones_like(begins)
        ends[:, :-1] = begins[:, 1:]
        end = torch.where(ends, place + 1, sequence).flip(1).cummin(1).values.flip(1)
        return cls(first.int(), end.int())

    def require_consistent(self) -> None:
        """Refuse bounds that contradict each other. Waits for the device: for debugging (`is_debugging`).

        Raises:
            ValueError: the first such position.
        """
        right = Documents.of(self.first)
        wrong = (self.first != right.first) | (self.end != right.end)
        for b, i in wrong.nonzero().tolist():
            raise ValueError(
                f"sequence {b}, position {i}: it sees keys from {self.first[b, i]} on and is seen by queries before "
                f"{self.end[b, i]}, which are not the bounds of a document in {self.first.shape[1]} positions; make "
                f"them with Documents.of"
            )


def require_possible(head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what no kernel can do.

    Raises:
        ValueError: what it is, and what is possible.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"routed attention takes {names}, not {name}")
    largest = LARGEST_FP32_HEAD if dtype == torch.float32 else LARGEST_HEAD
    if head_size % 2 or not 0 < head_size <= largest:
        raise ValueError(f"routed attention takes even head sizes up to {largest} in {name}, not {head_size}")
    if device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"routed attention runs on CUDA devices, not on {device.type}; TRITON_INTERPRET=1 in the environment "
            f"interprets it there, for tests"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"routed attention needs compute capability 8.0 (A100) or later, this GPU has {major}.{minor}")


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET was 1 when they were imported."""
    return not isinstance(forward_kernel, triton.JITFunction)


def is_debugging() -> bool:
    """Whether slots, bounds and shared gradients are checked, at the price of waiting for the device."""
    return os.environ.get("SKVR_KERNELS_DEBUG") == "1"
