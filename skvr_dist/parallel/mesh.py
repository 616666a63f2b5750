"""Ranks, their coordinates and their groups. Passed to whoever needs them; nothing here is global."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.errors import UserError


@dataclass(frozen=True)
class Mesh:
    """This rank's place: a tensor-parallel rank of a stage of the pipeline, in one data-parallel replica.

    Neighbouring ranks are tensor-parallel ones (they talk most), then come replicas, then stages.
    """

    topology: PipeModelDataParallelTopology
    rank: int
    world_size: int
    stage: int
    stages: int
    replica: int
    replicas: int
    tensor: int
    """This rank's number among those that share its layers."""
    tensors: int
    tensor_group: dist.ProcessGroup
    kv_group: dist.ProcessGroup | None
    """The tensor-parallel ranks that hold the same key/value head, where there are fewer heads than ranks."""
    replica_group: dist.ProcessGroup
    """The ranks that hold the same layers and shards in the other replicas, over gloo."""
    host_group: dist.ProcessGroup
    """All ranks over gloo, for small tensors on the host: routing plans and counters never wait for a device."""

    @classmethod
    def build(cls, parallel: ParallelConfig, model: ModelConfig) -> Mesh:
        """Lay the ranks of the default process group out; collective over all of them."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        stages, tensors = parallel.pipeline, parallel.tensor
        replicas = world_size // (stages * tensors)
        topology = PipeModelDataParallelTopology(num_pp=stages, num_mp=tensors, num_dp=replicas)
        place = topology.get_coord(rank)
        by_tensor, by_replica = topology.get_axis_comm_lists("model"), topology.get_axis_comm_lists("data")
        copies = tensors // model.num_key_value_heads  # ranks of one key/value head
        by_head = (
            [ranks[i : i + copies] for ranks in by_tensor for i in range(0, tensors, copies)] if copies > 1 else []
        )
        return cls(
            topology=topology,
            rank=rank,
            world_size=world_size,
            stage=place.pipe,
            stages=stages,
            replica=place.data,
            replicas=replicas,
            tensor=place.model,
            tensors=tensors,
            tensor_group=own_group(by_tensor),
            kv_group=own_group(by_head) if copies > 1 else None,
            replica_group=own_group(by_replica, "gloo"),
            host_group=dist.new_group(backend="gloo"),
        )

    @property
    def place(self) -> str:
        """This rank in words."""
        return f"rank {self.rank} (stage {self.stage}, replica {self.replica}, tensor {self.tensor})"

    def stage_rank(self, stage: int) -> int:
        """The rank at this one's place in another stage."""
        return self.topology.get_rank(pipe=stage, data=self.replica, model=self.tensor)

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

    def from_first_rank(self, value: str) -> str:
        """What rank 0 has; collective."""
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.host_group)
        return said[0]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, of a list of equal length on each."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()


def own_group(rank_lists: Iterable[list[int]], backend: str | None = None) -> dist.ProcessGroup:
    """Make a group of each list of ranks and return the one this rank is in; collective over all ranks."""
    return next(group for group in new_groups(rank_lists, backend) if group is not None)


def new_groups(rank_lists: Iterable[list[int]], backend: str | None = None) -> list[dist.ProcessGroup | None]:
    """A group of each list of ranks, None for those without this rank; collective over all ranks.

    Every rank makes every group, in the same order, since torch numbers them; only members connect.
    """
    groups = [dist.new_group(ranks, backend=backend) for ranks in rank_lists]
    return [group if isinstance(group, dist.ProcessGroup) else None for group in groups]
