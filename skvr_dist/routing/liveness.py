"""Liveness: which keys and values are read, and which of them must cross a depth.

A layer's keys and values that nobody reads are never computed; those that a later pipeline stage reads are
all that has to be sent to it, besides the hidden states.

Shapes: donors is int [L], the donors of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def read_layers(donors: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [L]: whether anyone, the layer itself or a later one, reads that layer's keys and values."""
    read = np.zeros(len(donors), dtype=np.bool_)
    read[np.asarray(donors)] = True
    return read


def crossing_layers(donors: Sequence[int] | NDArray[np.int64], boundary: int) -> tuple[int, ...]:
    """The crossing set: layers below `boundary` that some layer at or after it reads, ascending."""
    above = np.asarray(donors)[boundary:]
    return tuple(int(layer) for layer in np.unique(above[above < boundary]))


def crossing_elements(
    donors: Sequence[int] | NDArray[np.int64], boundary: int, *, tokens: int, hidden_size: int, kv_size: int
) -> int:
    """The liveness bound: elements that a boundary cannot do without for one micro-batch.

    Args:
        boundary: index of the first layer after the boundary.
        tokens: tokens of the micro-batch (batch x sequence).
        hidden_size: elements of a hidden state per token.
        kv_size: elements of one layer's keys (or values) per token.
    """
    return tokens * (hidden_size + 2 * kv_size * len(crossing_layers(donors, boundary)))
