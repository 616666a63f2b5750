"""Which part of a whole tensor a rank holds, as rectangles.

A rank holds a shard of a weight (`skvr_dist.model.modules.TensorShard`), and of that shard's master weight and moments
only a flat slice when ZeRO shares them out. A flat slice of a matrix is at most three rectangles: the end of a row,
whole rows, the beginning of a row. Rectangles are what a checkpoint stores, and any others can be read from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from skvr_dist.model.modules import TensorShard

WEIGHTS = "weights."
"""Prefix of the names of weights in a checkpoint."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The moments of Adam, as torch calls them; in a checkpoint `exp_avg.NAME`."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of a whole tensor, and the memory that holds it here."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offsets: tuple[int, ...]
    """Where the rectangle begins in the whole tensor."""
    tensor: Tensor
    """The rectangle; a view, so that what is read into it is in place."""

    def load(self) -> Tensor:
        """The rectangle's contents, for writing."""
        return self.tensor

    def copy(self) -> Piece:
        """A copy of the rectangle in host memory."""
        return Piece(self.shape, self.offsets, self.tensor.detach().to("cpu", copy=True))


@dataclass(frozen=True, eq=False)
class LazyPiece(Piece):
    """A piece whose `tensor` has shape and dtype only (it is on the device `meta`) until it is written."""

    read: Callable[[], Tensor]

    def load(self) -> Tensor:
        return self.read()


Pieces = dict[str, list[Piece]]
"""The pieces that a rank holds of each tensor, by the tensor's name in the checkpoint."""


def pieces_of(shard: TensorShard, local_shape: tuple[int, ...], flat: Tensor, start: int = 0) -> list[Piece]:
    """The rectangles of a flat slice of a shard.

    Args:
        shard: which part of the whole tensor the local one is.
        local_shape: shape of the local tensor, padding included.
        flat: [N], elements `start` to `start + N` of the flattened local tensor.
    """
    if len(local_shape) == 1:
        stop = min(start + flat.numel(), shard.length)
        return [Piece(shard.shape, (shard.start + start,), flat[: stop - start])] if start < stop else []
    rows, columns = (shard.length, local_shape[1]) if shard.dim == 0 else (local_shape[0], shard.length)
    stop = min(start + flat.numel(), rows * columns)  # rows beyond the shard's are padding
    found = []
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        height = (stop - position) // columns if column == 0 else 0
        width = columns if height else min(columns - column, stop - position)
        size = max(height, 1) * width
        view = flat[position - start : position - start + size].view(max(height, 1), width)
        origin = (shard.start + row, column) if shard.dim == 0 else (row, shard.start + column)
        found.append(Piece(shard.shape, origin, view))
        position += size
    return found
