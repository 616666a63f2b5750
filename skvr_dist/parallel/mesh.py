"""Ranks, their coordinates and their groups, passed as arguments: nothing here is global."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.errors import UserError
from skvr_dist.host_group import HostGroup
from skvr_dist.parallel.roll_call import announce_host, announced_hosts

AXES = ("pp", "dp", "tp")
"""Pipeline stages, data-parallel replicas, tensor-parallel ranks: from the slowest to the fastest in rank numbers."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in torch's device mesh: tensor-parallel rank, pipeline stage and data-parallel replica.

    Neighbouring ranks are tensor-parallel ones (they talk most), then come replicas, then stages.
    """

    devices: DeviceMesh
    """Of three dimensions, `AXES`."""
    rank: int
    pp_rank: int
    """This rank's pipeline stage."""
    pp_size: int
    dp_rank: int
    """This rank's data-parallel replica."""
    dp_size: int
    tp_rank: int
    """This rank's number among those that share its layers."""
    tp_size: int
    tp_group: dist.ProcessGroup
    tp_group_on_host: dist.ProcessGroup | None
    """The same over gloo, for what lies on the host; None for one rank."""
    kv_group: dist.ProcessGroup | None
    """The tensor-parallel ranks that hold the same key/value head, where there are fewer heads than ranks."""
    host_group: HostGroup
    """All ranks, for small things on the host: routing plans and counters never wait for a device."""
    hosts: tuple[str, ...]
    """The name of each rank's host."""

    @classmethod
    def build(cls, parallel: ParallelConfig, model: ModelConfig) -> Mesh:
        """Lay the ranks of the default process group out; collective over all of them."""
        pp_size, tp_size = parallel.pipeline, parallel.tensor
        _announce_this_host()
        dp_size = dist.get_world_size() // (pp_size * tp_size)
        devices = init_device_mesh(
            "cuda" if dist.get_backend() == "nccl" else "cpu",
            (pp_size, dp_size, tp_size),
            mesh_dim_names=AXES,
        )
        neighbours = devices.mesh.view(-1, tp_size).tolist()
        copies = tp_size // model.num_key_value_heads  # ranks of one key/value head
        return cls(
            devices=devices,
            rank=devices.get_rank(),
            pp_rank=devices.get_local_rank("pp"),
            pp_size=pp_size,
            dp_rank=devices.get_local_rank("dp"),
            dp_size=dp_size,
            tp_rank=devices.get_local_rank("tp"),
            tp_size=tp_size,
            tp_group=devices.get_group("tp"),
            tp_group_on_host=own_group(neighbours, _host_backend()) if tp_size > 1 else None,
            kv_group=own_group(devices.mesh.view(-1, copies).tolist()) if copies > 1 else None,
            host_group=new_host_group(),
            hosts=_hosts(),
        )

    @property
    def world_size(self) -> int:
        """Ranks of all stages, replicas and tensor-parallel groups."""
        return self.pp_size * self.dp_size * self.tp_size

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank has the lowest number of those on its host."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank

    @property
    def sockets(self) -> int:
        """Connections of this rank over gloo where devices talk over NCCL: the host groups of training and of saving,
        that of the tensor-parallel ranks, and the store."""
        return 2 * self.host_group.sockets + self.tp_size - 1 + 1

    @property
    def name(self) -> str:
        """This rank and its coordinates, for messages."""
        return f"rank {self.rank} (stage {self.pp_rank}, replica {self.dp_rank}, tensor {self.tp_rank})"

    def stage_rank(self, stage: int) -> int:
        """The rank with this one's other coordinates in another stage."""
        return int(self.devices.mesh[stage, self.dp_rank, self.tp_rank])

    def pipelines(self) -> list[list[int]]:
        """The ranks of each pipeline, one per stage: lists that differ in replica and tensor-parallel rank."""
        return self.devices.mesh.view(self.pp_size, -1).T.tolist()

    def require_same(self, facts: dict[str, Any]) -> None:
        """Compare facts over all ranks; collective.

        Raises:
            UserError: on every rank, if any differs; unnoticed, ranks would train different things or hang.
        """
        if self.host_group.is_same(repr(facts).encode()):
            return
        gathered = self.host_group.gather(facts)
        for rank, theirs in enumerate(gathered):
            for name, value in gathered[0].items():
                if theirs[name] != value:
                    apart = self.hosts[rank] != self.hosts[0]
                    here, there = (f" on {self.hosts[each]}" if apart else "" for each in (0, rank))
                    raise UserError(
                        f"ranks 0 and {rank} disagree on the {name}: {value!r}{here} and {theirs[name]!r}{there}; do "
                        f"all hosts see the same environment, code, configuration, data and output folder?"
                    )


def new_host_group() -> HostGroup:
    """A group of all ranks for small things on the host; collective."""
    return HostGroup(_host_backend())


def _host_backend() -> str:
    return dist.get_backend() if _is_made_up() else "gloo"


def _is_made_up() -> bool:
    """Whether the process group is none of this world's (`skvr_dist.lab.virtual`)."""
    return dist.get_backend() not in ("gloo", "nccl")


def _announce_this_host() -> None:
    """Leave the name of this host for the other ranks."""
    if not _is_made_up():
        announce_host(distributed_c10d._get_default_store(), dist.get_rank(), socket.gethostname())


def _hosts() -> tuple[str, ...]:
    """The host of each rank; once a group was made since all announced theirs, which waits for every rank."""
    if _is_made_up():
        return (socket.gethostname(),) * dist.get_world_size()
    return announced_hosts(distributed_c10d._get_default_store(), dist.get_world_size())


def own_group(rank_lists: Iterable[list[int]], backend: str | None = None) -> dist.ProcessGroup:
    """Make a group of each list of ranks and return the one this rank is in; collective over all ranks."""
    return next(group for group in new_groups(rank_lists, backend) if group is not None)


def new_groups(rank_lists: Iterable[list[int]], backend: str | None = None) -> list[dist.ProcessGroup | None]:
    """A group of each list of ranks, None for those without this rank; collective over all ranks.

    Every rank makes every group, in the same order, since torch numbers them; only members connect.
    """
    groups = [dist.new_group(ranks, backend=backend) for ranks in rank_lists]
    return [group if isinstance(group, dist.ProcessGroup) else None for group in groups]
