"""What crosses a stage boundary: one packed tensor per micro-batch, whose size both sides know from the plan.

The packed tensor is flat: hidden states, then keys and values of the crossing layers in ascending order. Its
gradient comes back in the same form. Neither needs a handshake about shapes.

Shapes: B batch, S sequence, D hidden, K key/value heads, E head_dim, N elements of the packed tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvr_dist.model.config import ModelConfig
from skvr_dist.routing import crossing_elements, crossing_layers


@dataclass(frozen=True)
class Boundary:
    """The cut in front of layer `layer`, for micro-batches of a fixed shape."""

    model: ModelConfig
    layer: int
    batch: int
    sequence: int

    def crossing(self, donors: Sequence[int]) -> tuple[int, ...]:
        """Layers whose keys and values cross here in a micro-batch with these donors (int [L])."""
        return crossing_layers(donors, self.layer)

    def shapes(self, donors: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of the parts: hidden [B, S, D], then keys and values [B, S, K, E] of each crossing layer."""
        head_shape = (self.batch, self.sequence, self.model.num_key_value_heads, self.model.head_dim)
        hidden_shape = (self.batch, self.sequence, self.model.hidden_size)
        return [hidden_shape, *([head_shape] * (2 * len(self.crossing(donors))))]

    def elements(self, donors: Sequence[int]) -> int:
        """N, the liveness bound."""
        return crossing_elements(
            donors,
            self.layer,
            tokens=self.batch * self.sequence,
            hidden_size=self.model.hidden_size,
            kv_size=self.model.kv_size,
        )

    def unpack(self, packed: Tensor, donors: Sequence[int]) -> list[Tensor]:
        """Views of the parts of a packed tensor [N]."""
        shapes = self.shapes(donors)
        parts = packed.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """One flat tensor [N] with the elements of the parts, in order; not part of any graph."""
    return torch.cat([part.detach().flatten() for part in parts])
