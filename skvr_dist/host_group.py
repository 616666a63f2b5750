"""All ranks of a run, for small things on the host: counters, plans, facts and what went wrong.

gloo connects every pair of ranks in a group when it is made: in one group of 1,024 ranks each would hold 1,023 sockets,
more than a process may open on most systems. So the ranks lie in a grid of rows and columns, each a group of its own,
and what is for all goes along one and then along the other. A rank of 1,024 is connected to 62 others.

Sums are taken in one fixed order, row by row, so they are the same on all ranks to the last bit.

Shapes: N ranks, W ranks of a row, H rows; rank number n is in row n // W and in column n % W.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class HostGroup:
    """All ranks over gloo; making one is collective, and so is every method.

    Threads of a rank that talk at the same time need one each.

    Args:
        backend: another than gloo, for a process group that is none of this world's.
    """

    def __init__(self, backend: str = "gloo") -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.width = row_width(self.size)
        everybody = torch.arange(self.size).view(-1, self.width)
        self.row = _group_of(everybody.tolist(), self.rank, backend)
        """The ranks of this row, in order; the first one, its head, is in column 0."""
        self.column = _group_of(everybody.T.tolist(), self.rank, backend)
        self.is_head = self.rank % self.width == 0

    @property
    def sockets(self) -> int:
        """Connections to other ranks that this rank holds for this group."""
        return connections(self.size)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum, of a list of equal length on each rank; equal on all ranks to the last bit."""
        total = torch.tensor(values, dtype=torch.float64)
        for group in (self.row, self.column):
            first, *others = _gathered(total, group)
            total = functools.reduce(torch.add, others, first)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank; pickled, for small ones."""
        rows: list[list[Any]] = [[]] * self.column.size()
        mine = [value] * self.row.size()
        dist.all_gather_object(mine, value, group=self.row)
        dist.all_gather_object(rows, mine, group=self.column)
        return [each for row in rows for each in row]

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """The value of every rank, by rank, on rank 0; None on the others."""
        row = [None] * self.row.size() if self.is_head else None
        dist.gather_object(value, row, group=self.row, group_dst=0)
        if not self.is_head:
            return None
        rows: list[list[Any]] | None = [[]] * self.column.size() if self.rank == 0 else None
        dist.gather_object(row, rows, group=self.column, group_dst=0)
        return None if rows is None else [each for row in rows for each in row]

    def scatter_from_first(self, values: list[Any] | None) -> Any:
        """Each rank's own of the values that rank 0 gives, by rank; None on the others."""
        row: list[Any] = [None]
        if self.is_head:
            cut = [values[at : at + self.width] for at in range(0, self.size, self.width)] if values else None
            dist.scatter_object_list(row, cut, group=self.column, group_src=0)
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, row[0], group=self.row, group_src=0)
        return mine[0]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value; pickled, for small ones."""
        said = [value]
        if self.is_head:
            dist.broadcast_object_list(said, group=self.column, group_src=0)
        dist.broadcast_object_list(said, group=self.row, group_src=0)
        return said[0]

    def is_same(self, data: bytes) -> bool:
        """Whether all ranks hold the same bytes, found by comparing 7 bytes of a hash."""
        number = torch.tensor(int.from_bytes(hashlib.sha256(data).digest()[:7], "little"))
        for group in (self.row, self.column):
            found = _gathered(number, group)
            # Whoever meets a difference passes it on as a number that no hash has.
            number = number if all(torch.equal(number, other) for other in found) else torch.tensor(-1)
        return int(number) >= 0

    def first_problem(self, problem: str | None) -> str | None:
        """What went wrong on the first rank on which something did; None if nothing did anywhere."""
        if not self.sum([float(problem is not None)])[0]:
            return None
        return next(said for said in self.gather(problem) if said is not None)

    def start_to_heads(self, tensor: Tensor) -> dist.Work | None:
        """Begin to send rank 0's tensor to the heads of all rows; None on other ranks, which do not take part."""
        return dist.broadcast(tensor, group=self.column, group_src=0, async_op=True) if self.is_head else None

    def start_to_rows(self, tensor: Tensor) -> dist.Work | None:
        """Begin to send the tensor of each row's head to its row."""
        return dist.broadcast(tensor, group=self.row, group_src=0, async_op=True)


def row_width(ranks: int) -> int:
    """W for that many ranks: the divisor that connects each with the fewest others."""
    divisors = [width for width in range(1, ranks + 1) if ranks % width == 0]
    return min(divisors, key=lambda width: (width + ranks // width, -width))


def connections(ranks: int) -> int:
    """Sockets of a rank for one host group of that many ranks: to its row and its column."""
    width = row_width(ranks)
    return width - 1 + ranks // width - 1


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    found = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(found, tensor, group=group)
    return found


def _group_of(rank_lists: list[list[int]], rank: int, backend: str) -> dist.ProcessGroup:
    """Make a group of each list, on all ranks in one order, since torch numbers them; only members connect."""
    groups = {tuple(ranks): dist.new_group(ranks, backend=backend) for ranks in rank_lists}
    group = next(group for ranks, group in groups.items() if rank in ranks)
    assert isinstance(group, dist.ProcessGroup)
    return group
