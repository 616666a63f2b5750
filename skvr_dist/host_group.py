"""All ranks of a run, for small things on the host: counters, plans, facts and what went wrong.

gloo connects every pair of ranks in a group when it is made: in one group of 1,024 ranks each would hold 1,023 sockets,
about as many files as a process may open on most systems. So the ranks of a large run lie in a grid, 1,024 of them in
one of 16 x 8 x 8. Each line of the grid is a group of its own, and what is for all goes along one axis after the other.
A rank of 1,024 is connected to 29 others.

Sums are taken in one fixed order, so they are the same on all ranks to the last bit.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_LARGEST_LINE = 16  # ranks of a line where the number of all has such factors
_MOST_AXES = 3


class HostGroup:
    """All ranks over gloo; making one is collective, and so is every method.

    Threads of a rank that talk at the same time need one each.

    Args:
        backend: another than gloo, for a process group that is none of this world's.
        largest_line: ranks of a line, if the number of all has such factors.
    """

    def __init__(self, backend: str = "gloo", largest_line: int = _LARGEST_LINE) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._axes: list[tuple[dist.ProcessGroup, bool]] = []
        """From the axis of neighbours to that of the farthest: this rank's line, and whether this rank stands for all
        of those that it shares the axes before with, being the first of them."""
        shape = grid(self.size, largest_line)
        ranks, stride = torch.arange(self.size).view(shape[::-1]), 1
        for axis, length in enumerate(shape, start=1):
            lines = ranks.movedim(-axis, -1).reshape(-1, length).tolist()
            self._axes.append((_group_of(lines, self.rank, backend), self.rank % stride == 0))
            stride *= length

    @property
    def line(self) -> dist.ProcessGroup:
        """The line of neighbours, which everything that is for all goes through once."""
        return self._axes[0][0]

    def pass_on(self, sent: Tensor, received: Tensor) -> None:
        """Send a tensor to the next rank of this line, and receive one from the rank before it: the last one's at its
        beginning, as in `before`."""
        place, length = self.line.rank(), self.line.size()
        work = dist.isend(sent, group=self.line, group_dst=(place + 1) % length)
        dist.recv(received, group=self.line, group_src=(place - 1) % length)
        if work is not None:
            work.wait()

    @property
    def sockets(self) -> int:
        """Connections to other ranks that this rank holds for this group."""
        return sum(group.size() - 1 for group, _ in self._axes)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum, of a list of equal length on each rank; equal on all ranks to the last bit."""
        total = torch.tensor(values, dtype=torch.float64)
        for group, _ in self._axes:
            first, *others = _gathered(total, group)
            total = functools.reduce(torch.add, others, first)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank; pickled, for small ones."""
        known = [value]
        for group, _ in self._axes:
            parts: list[list[Any]] = [[]] * group.size()
            dist.all_gather_object(parts, known, group=group)
            known = [each for part in parts for each in part]
        return known

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """The value of every rank, by rank, on rank 0; None on the others."""
        known = [value]
        for group, takes_part in self._axes:
            if takes_part:
                parts: list[list[Any]] | None = [[]] * group.size() if group.rank() == 0 else None
                dist.gather_object(known, parts, group=group, group_dst=0)
                known = [each for part in parts or [] for each in part]
        return known if self.rank == 0 else None

    def scatter_from_first(self, values: list[Any] | None) -> Any:
        """Each rank's own of the values that rank 0 gives, by rank; None on the others."""
        known: list[Any] = values or []
        for group, takes_part in reversed(self._axes):
            if takes_part:
                share = len(known) // group.size()
                cut = [known[at : at + share] for at in range(0, len(known), share)] if known else None
                mine: list[Any] = [None]
                dist.scatter_object_list(mine, cut, group=group, group_src=0)
                known = mine[0]
        return known[0]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value; pickled, for small ones."""
        said = [value]
        for group, takes_part in reversed(self._axes):
            if takes_part:
                dist.broadcast_object_list(said, group=group, group_src=0)
        return said[0]

    def is_same(self, data: bytes) -> bool:
        """Whether all ranks hold the same bytes, found by comparing 7 bytes of a hash."""
        number = torch.tensor(int.from_bytes(hashlib.sha256(data).digest()[:7], "little"))
        for group, _ in self._axes:
            found = _gathered(number, group)
            # Whoever meets a difference passes it on as a number that no hash has.
            number = number if all(torch.equal(number, other) for other in found) else torch.tensor(-1)
        return int(number) >= 0

    def first_problem(self, problem: str | None) -> str | None:
        """What went wrong on the first rank on which something did; None if nothing did anywhere."""
        if not self.sum([float(problem is not None)])[0]:
            return None
        return next(said for said in self.gather(problem) if said is not None)

    @property
    def hops(self) -> int:
        """How many hops bring a tensor from rank 0 to all ranks."""
        return len(self._axes)

    def start_hop(self, hop: int, tensor: Tensor) -> dist.Work | None:
        """Begin to send rank 0's tensor one hop further, from those that have it; None where a later hop will end.

        Args:
            hop: from 0; every one before it must have ended.
        """
        group, takes_part = self._axes[-1 - hop]
        return dist.broadcast(tensor, group=group, group_src=0, async_op=True) if takes_part else None


def grid(ranks: int, largest_line: int = _LARGEST_LINE) -> tuple[int, ...]:
    """Lengths of the axes of a grid of that many ranks, the longest first.

    As few axes as lines of at most `largest_line` ranks allow, but no more than three; then as short ones as can be.
    """
    best: tuple[int, ...] = (ranks,)
    for axes in range(1, _MOST_AXES + 1):
        best = min(_factors(ranks, axes), key=lambda shape: (max(shape), sum(shape)))
        if max(best) <= largest_line:
            break
    return tuple(sorted((length for length in best if length > 1), reverse=True)) or (1,)


def _factors(product: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (product,)
        return
    for first in range(1, math.isqrt(product) + 1):
        for factor in {first, product // first} if product % first == 0 else ():
            yield from ((factor, *others) for others in _factors(product // factor, count - 1))


def before(rank: int, ranks: int) -> int:
    """The rank before another one in its line."""
    length = grid(ranks)[0]
    return rank - 1 if rank % length else rank + length - 1


def connections(ranks: int) -> int:
    """Sockets of a rank for one host group of that many ranks."""
    return sum(length - 1 for length in grid(ranks))


def _gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if group.size() == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(found, tensor, group=group)
    return found


def _group_of(rank_lists: list[list[int]], rank: int, backend: str) -> dist.ProcessGroup:
    """Make a group of each list, on all ranks in one order, since torch numbers them; only members connect."""
    groups = {tuple(ranks): dist.new_group(ranks, backend=backend) for ranks in rank_lists}
    group = next(group for ranks, group in groups.items() if rank in ranks)
    assert isinstance(group, dist.ProcessGroup)
    return group
