"""What the ranks of each stage take: memory, and seconds for each part of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import psutil
import torch

from skvr_dist.parallel.mesh import Mesh

_GIB = 2**30


def memory_of_rank(on_gpu: bool) -> dict[str, float]:
    """GiB that this process holds; on GPUs of the device too, from the allocator's own counters on the host.

    Args:
        on_gpu: whether it computes on a GPU.
    """
    found = {"resident_gib": psutil.Process().memory_info().rss / _GIB}
    if on_gpu:
        found["allocated_peak_gib"] = torch.cuda.max_memory_allocated() / _GIB
        found["reserved_gib"] = torch.cuda.memory_reserved() / _GIB
    return found


class UsageWatch:
    """Gathers what ranks take, and reports it by stage.

    Args:
        every_steps: steps between two reports.
        last_step: reports as well.
    """

    def __init__(self, mesh: Mesh, every_steps: int, last_step: int) -> None:
        self._mesh, self._every_steps, self._last_step = mesh, every_steps, last_step
        self._on_gpu = mesh.devices.device_type == "cuda"
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._is_first = True

    def add(self, parts: Mapping[str, float]) -> None:
        """Note the seconds of a step's parts on this rank; nothing of the first, which loads code."""
        if not self._is_first:
            self._sums = {part: self._sums.get(part, 0.0) + seconds for part, seconds in parts.items()}
            self._steps += 1
        self._is_first = False

    def report(self, step: int) -> dict[str, float]:
        """Values for the metrics when it is time; collective."""
        if step % self._every_steps and step != self._last_step:
            return {}
        mine = {f"memory/{name}": size for name, size in memory_of_rank(self._on_gpu).items()}
        mine |= {f"time/{part}_seconds": seconds / self._steps for part, seconds in self._sums.items()}
        self._sums, self._steps = {}, 0
        stages = {rank: stage for pipe in self._mesh.pipelines() for stage, rank in enumerate(pipe)}
        gathered = self._mesh.host_group.gather(list(mine.values()))
        return by_stage(list(mine), [stages[rank] for rank in range(len(gathered))], gathered)


def by_stage(tags: Sequence[str], stages: Sequence[int], values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of each stage's ranks the largest memory, and the mean of the seconds.

    Args:
        tags: what the values are.
        stages: of each rank.
        values: of each rank, one for each tag.
    """
    found = {}
    for stage in sorted(set(stages)):
        columns = zip(*(each for each, where in zip(values, stages, strict=True) if where == stage), strict=True)
        for tag, column in zip(tags, columns, strict=True):
            found[f"{tag}/stage_{stage}"] = max(column) if tag.startswith("memory/") else mean(column)
    return found
