"""One process as one rank of a run of any size: it builds the real engine and trains real steps, of a made-up world.

torch's fake process group answers every operation at once, and `Recorder` makes up what the others would have sent. So
the numbers that come out mean nothing; what the rank holds, and what it asks of whom in which order, is what a rank of
the whole run would.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from skvr_dist.config.tree import Config
from skvr_dist.lab.virtual.record import Event, Operation, Recorder


@dataclass(frozen=True)
class Trace:
    """What one rank asked of others, in order, and where it is."""

    rank: int
    stage: int
    replica: int
    tensor: int
    start: list[Event]
    """Before the first step: groups, engine, first plan."""
    steps: list[Event]
    """In all steps; numbers of operations go on from those of the start."""
    sockets: int
    """Connections to other ranks over gloo, where devices talk over NCCL (`Mesh.sockets`)."""
    host_line: str
    """Name of the group that everything goes through that all ranks take part in."""

    def world_operations(self, world_size: int | None) -> int:
        """What all ranks take part in, in all steps: over the grid of the host group, or one group of all.

        Args:
            world_size: ranks; None if a group of all of them is that of the only replica, or of all replicas.
        """
        asked = [event for event in self.steps if isinstance(event, Operation) and event.peer is None]
        return sum(event.group == self.host_line or len(event.ranks) == world_size for event in asked)


def trace_rank(config: Config, rank: int, world_size: int, steps: int = 1) -> Trace:
    """Build and train as one rank. For a process of its own, that has no process group yet.

    Args:
        config: any whose layout fits the world; its data is not read.
    """
    join_made_up_world(rank, world_size)
    with Recorder(make_up=True) as recorder:
        return train_recorded(config, recorder, steps)


def train_recorded(config: Config, recorder: Recorder, steps: int) -> Trace:
    """Build the engine and train on made-up tokens, in the process group that is there; collective."""
    from skvr_dist.data.batch import MicroBatch
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.plans import plan_stream

    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    plans = plan_stream(config, mesh, 0)
    started = len(recorder.events)
    shape = config.train.micro_batch_size, config.data.sequence_length + 1
    tokens = torch.zeros((config.num_micro_batches // mesh.dp_size, *shape), dtype=torch.long)
    for _ in range(steps):
        engine.train_step(map(MicroBatch.of, tokens), plans.next())
    events = recorder.events
    place = mesh.rank, mesh.pp_rank, mesh.dp_rank, mesh.tp_rank
    return Trace(*place, events[:started], events[started:], mesh.sockets, mesh.host_group.line.group_name)


def join_made_up_world(rank: int, world_size: int) -> None:
    """Make this process a rank of a world that answers every operation at once with nothing."""
    from skvr_dist.parallel.engine.process_group import start_process_group

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody goes there
    torch.set_num_threads(1)
    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=dist.HashStore())
    start_process_group()
