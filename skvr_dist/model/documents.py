"""Where the documents of a micro-batch begin and end: worked out on the host, which then waits for no device.

Shapes: B sequences, S sequence length, R rows of donors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skvr_dist.model.devices import to_device


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a micro-batch, for all layers and each of the R rows of donors, which split its sequences."""

    positions: Tensor
    """int64 [B, S]: the place of each token within its document."""
    bounds: tuple[Tensor, ...]
    """For each row, int32 [documents + 1]: where each begins among the positions of its sequences, and the end."""
    longest: tuple[int, ...]
    """For each row, the tokens of its longest document."""

    @classmethod
    def of(cls, numbers: Tensor, rows: int = 1) -> Documents:
        """The documents that positions belong to; on the host, to which numbers on another device are fetched.

        Args:
            numbers: int [B, S], the document of each position, never falling within a sequence.
            rows: R, which divides B.
        """
        numbers = numbers.cpu()
        starts = torch.ones_like(numbers, dtype=torch.bool)
        starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        place = torch.arange(numbers.shape[1]).expand_as(numbers)
        positions = place - torch.where(starts, place, 0).cummax(dim=1).values
        flat = [row.flatten() for row in starts.chunk(rows)]
        bounds = tuple(F.pad(row.nonzero().flatten(), (0, 1), value=len(row)).int() for row in flat)
        return cls(positions, bounds, tuple(int(row.diff().max()) for row in bounds))

    def to(self, device: torch.device) -> Documents:
        """These on a device, without waiting for it."""
        bounds = tuple(to_device(row, device) for row in self.bounds)
        return Documents(to_device(self.positions, device), bounds, self.longest)
