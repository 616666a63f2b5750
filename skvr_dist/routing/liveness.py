"""Liveness: which keys and values are read, and which of them must cross a depth.

A layer's keys and values that nobody reads are never computed; those that a later pipeline stage reads are
all that has to be sent to it, besides the hidden states.

Shapes: donors is int [L], the donors of one row of a plan; or [R, L], those of a micro-batch of R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

KVPart = tuple[int, int]
"""(layer, row): a layer's keys and values for the sequences of one row of a micro-batch, in the micro-batch's count."""


def read_layers(donors: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [L]: whether anyone, the layer itself or a later one, reads that layer's keys and values, in any row."""
    sources = np.asarray(donors)
    read = np.zeros(sources.shape[-1], dtype=np.bool_)
    read[sources] = True
    return read


def crossing_layers(donors: Sequence[int] | NDArray[np.int64], boundary: int) -> tuple[int, ...]:
    """The crossing set: layers below `boundary` that some layer at or after it reads, ascending."""
    above = np.asarray(donors)[boundary:]
    return tuple(int(layer) for layer in np.unique(above[above < boundary]))


def crossing_parts(donors: Sequence[Sequence[int]] | NDArray[np.int64], boundary: int) -> tuple[KVPart, ...]:
    """The crossing sets of R rows, int [R, L], as one: by layer and then by row, ascending."""
    return tuple(sorted((layer, row) for row, each in enumerate(donors) for layer in crossing_layers(each, boundary)))


def crossing_elements(
    donors: Sequence[int] | NDArray[np.int64], boundary: int, *, tokens: int, hidden_size: int, kv_size: int
) -> int:
    """The liveness bound: elements that a boundary cannot do without for one row, donors int [L].

    Args:
        boundary: index of the first layer after the boundary.
        tokens: tokens of the row's sequences (sequences x sequence length).
        hidden_size: elements of a hidden state per token.
        kv_size: elements of one layer's keys (or values) per token.
    """
    return tokens * (hidden_size + 2 * kv_size * len(crossing_layers(donors, boundary)))
