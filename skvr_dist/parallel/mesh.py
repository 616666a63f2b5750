"""Ranks, their coordinates and their groups. Passed to whoever needs them; nothing here is global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from skvr_dist.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """This rank's place: a stage of the pipeline in one data-parallel replica."""

    topology: PipeDataParallelTopology
    rank: int
    world_size: int
    stage: int
    stages: int
    replica: int
    replicas: int
    host_group: dist.ProcessGroup
    """All ranks over gloo, for small tensors on the host: routing plans and counters never wait for a device."""

    @classmethod
    def build(cls, stages: int) -> Mesh:
        """Lay the ranks of the default process group out; collective over all of them."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        replicas = world_size // stages
        topology = PipeDataParallelTopology(num_pp=stages, num_dp=replicas)
        place = topology.get_coord(rank)
        return cls(
            topology=topology,
            rank=rank,
            world_size=world_size,
            stage=place.pipe,
            stages=stages,
            replica=place.data,
            replicas=replicas,
            host_group=dist.new_group(backend="gloo"),
        )

    def require_same(self, facts: dict[str, Any]) -> None:
        """Compare facts over all ranks; collective.

        Raises:
            UserError: a rank differs, on every rank. Left unnoticed, ranks would train different things or hang.
        """
        gathered: list[dict[str, Any]] = [{}] * self.world_size
        dist.all_gather_object(gathered, facts, group=self.host_group)
        for rank, theirs in enumerate(gathered):
            for name, value in gathered[0].items():
                if theirs[name] != value:
                    raise UserError(
                        f"ranks 0 and {rank} disagree on the {name}: {value!r} and {theirs[name]!r}; do all hosts see "
                        f"the same configuration, data and output folder?"
                    )

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, of a list of equal length on each."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()
