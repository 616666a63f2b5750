"""Which rank, which host and which link makes the others wait.

Every step of a run takes as long on each rank as on the slowest, so the time of a step tells nothing about a rank. Two
things do: how long its own part takes, in which it waits for nobody (reading its data and its forward passes), and how
long a message from the rank before it is under way. Both are gathered every `train.watch_ranks_every_steps` steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.distributed as dist

from skvr_dist.host_group import before
from skvr_dist.parallel.mesh import Mesh

SLOW_RANK = 1.5
"""A rank is slow from this multiple on of what the others with the same work take (their median)."""
SLOW_LINK = 5.0
"""A link between hosts is slow from this multiple on of the fastest one, or of its own best time in this run."""
_PROBE_BYTES = 1 << 18
_PROBES = 3  # the best of them counts: a process may have to wait for a core
_SHORTEST_SECONDS = 0.005
"""What no run would notice is not worth a line."""
_NAMED = 4
"""Ranks or links that one line names."""


@dataclass(frozen=True)
class RankTimes:
    """Means over the steps since the last report, in seconds, of one rank."""

    host: str
    stage: int
    step: float
    own: float
    """Reading its data and its forward passes."""
    wait: float
    """Receiving from other stages, adding up gradients and updating, which ends when the slowest rank is there."""
    link: float
    """A message from the rank before it (`skvr_dist.host_group.before`)."""


class RankWatch:
    """Gathers what each rank takes.

    Args:
        every_steps: steps between two reports.
    """

    def __init__(self, mesh: Mesh, every_steps: int) -> None:
        self._mesh, self._every_steps = mesh, every_steps
        self._sums, self._steps = [0.0, 0.0, 0.0], 0
        self._best_links = [float("inf")] * mesh.world_size
        self._is_first = True

    def add(self, step: float, own: float, wait: float) -> None:
        """Note the seconds of a step on this rank; nothing of the first, which reserves memory and loads code."""
        if not self._is_first:
            self._sums = [total + value for total, value in zip(self._sums, (step, own, wait), strict=True)]
            self._steps += 1
        self._is_first = False

    def report(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Values for the metrics, and a sentence for each rank or link that is slow, when it is time; collective."""
        if step % self._every_steps or self._mesh.world_size == 1 or not self._steps:
            return {}, []
        ranks = self._gather()
        self._sums, self._steps = [0.0, 0.0, 0.0], 0
        self._best_links = [min(best, rank.link) for best, rank in zip(self._best_links, ranks, strict=True)]
        return values_by_host(ranks), [*slow_ranks(ranks), *slow_links(ranks, self._best_links)]

    def _gather(self) -> list[RankTimes]:
        mesh = self._mesh
        mine = [*(total / self._steps for total in self._sums), self._probe()]
        stages = {rank: stage for pipe in mesh.pipelines() for stage, rank in enumerate(pipe)}
        gathered = enumerate(mesh.host_group.gather(mine))
        return [RankTimes(mesh.hosts[rank], stages[rank], *times) for rank, times in gathered]

    def _probe(self) -> float:
        """Seconds until a message of the rank before this one is here; collective."""
        mesh = self._mesh
        sent, received = torch.zeros(_PROBE_BYTES, dtype=torch.uint8), torch.zeros(_PROBE_BYTES, dtype=torch.uint8)
        best = float("inf")
        for _ in range(_PROBES):
            dist.barrier(mesh.host_group.line)
            started = time.perf_counter()
            mesh.host_group.pass_on(sent, received)
            best = min(best, time.perf_counter() - started)
        return best


def values_by_host(ranks: Sequence[RankTimes]) -> dict[str, float]:
    """What the slowest rank of each host takes by itself, and the longest way of a message to it."""
    values: dict[str, float] = {}
    for host in dict.fromkeys(rank.host for rank in ranks):
        its = [rank for rank in ranks if rank.host == host]
        values[f"ranks/own_seconds/{host}"] = max(rank.own for rank in its)
        values[f"ranks/wait_seconds/{host}"] = min(rank.wait for rank in its)
        values[f"ranks/link_seconds/{host}"] = max(rank.link for rank in its)
    return values


def slow_ranks(ranks: Sequence[RankTimes]) -> list[str]:
    """A sentence if ranks take longer than those with the same work: of their stage, of all where it has one rank."""
    slow: dict[int, float] = {}
    for number, rank in enumerate(ranks):
        others = [other.own for n, other in enumerate(ranks) if n != number and other.stage == rank.stage]
        others = others or [other.own for n, other in enumerate(ranks) if n != number]
        usual = median_low(others)
        if rank.own > SLOW_RANK * usual and rank.own - usual > _SHORTEST_SECONDS:
            slow[number] = usual
    if not slow:
        return []
    worst = sorted(slow, key=lambda number: slow[number] / ranks[number].own)[:_NAMED]
    named = ", ".join(
        f"rank {number} on {ranks[number].host} takes {ranks[number].own:.3f} s for its own part of a step, the others "
        f"{slow[number]:.3f} s and wait"
        for number in worst
    )
    more = f"; and {len(slow) - len(worst)} more" if len(slow) > len(worst) else ""
    return [f"slow: {named}{more}"]


def slow_links(ranks: Sequence[RankTimes], best: Sequence[float]) -> list[str]:
    """A sentence if messages between hosts take longer than elsewhere or before.

    Args:
        best: the shortest time in this run of each rank's link.
    """
    sender = [before(number, len(ranks)) for number in range(len(ranks))]
    between = [number for number, rank in enumerate(ranks) if ranks[sender[number]].host != rank.host]
    fastest = min((ranks[number].link for number in between), default=0.0)
    slow = [
        number
        for number in between
        if ranks[number].link > SLOW_LINK * min(fastest, best[number]) and ranks[number].link > _SHORTEST_SECONDS
    ]
    if not slow:
        return []
    ends = [{ranks[sender[number]].host, ranks[number].host} for number in slow]
    common = set.intersection(*ends)
    where = f"the link of {common.pop()}" if len(common) == 1 and len(slow) > 1 else "a link"
    named = ", ".join(
        f"rank {sender[number]} on {ranks[sender[number]].host} to rank {number} on {ranks[number].host} "
        f"{ranks[number].link:.3f} s"
        for number in sorted(slow, key=lambda number: -ranks[number].link)[:_NAMED]
    )
    usual = min(fastest, *(best[number] for number in slow))
    return [f"slow: {where}: {_PROBE_BYTES >> 10} KiB from {named}, the best {usual:.3f} s"]
