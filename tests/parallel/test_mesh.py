"""Where ranks are: as in DeepSpeed's topology; and what a stage makes of a plan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.lab.verify.cases import SHAPE
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.step_plan import PassPlan, plan_for_stage
from skvr_dist.routing import RoutingPlan, fixed_plan


def look_around(pp_size: int, tp_size: int) -> tuple[tuple[list[int], ...], str]:
    """This rank among stages, replicas and tensor-parallel ranks; and its name."""
    mesh = Mesh.build(ParallelConfig(pipeline=pp_size, tensor=tp_size), ModelConfig.model_validate(SHAPE))
    assert mesh.rank == dist.get_rank()
    stages = [mesh.stage_rank(stage) for stage in range(mesh.pp_size)]
    assert stages in mesh.pipelines()
    groups = dist.get_process_group_ranks(mesh.devices.get_group("dp")), dist.get_process_group_ranks(mesh.tp_group)
    for ranks, place in zip((stages, *groups), (mesh.pp_rank, mesh.dp_rank, mesh.tp_rank), strict=True):
        assert ranks[place] == mesh.rank
    return (stages, *groups), mesh.name


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2), (4, 1, 2), (2, 3, 1)])
def test_ranks_lie_as_in_deepspeeds_topology(sizes: tuple[int, int, int]) -> None:
    pp_size, dp_size, tp_size = sizes
    topology = PipeModelDataParallelTopology(num_pp=pp_size, num_dp=dp_size, num_mp=tp_size)
    for rank, (found, name) in enumerate(run_ranks(pp_size * dp_size * tp_size, look_around, pp_size, tp_size)):
        at = topology.get_coord(rank)
        assert name == f"rank {rank} (stage {at.pipe}, replica {at.data}, tensor {at.model})"
        for ranks, axis in zip(found, ("pipe", "data", "model"), strict=True):
            assert ranks in topology.get_axis_comm_lists(axis)
            assert rank in ranks


def test_what_enters_and_leaves_a_stage() -> None:
    replica: Any = SimpleNamespace(dp_rank=1, dp_size=2)
    donors = fixed_plan((0, 1, 2, 3, 4), 4).donors
    donors[1] = 0, 0, 0, 1, 2
    plan = RoutingPlan(donors)
    assert plan_for_stage(plan, replica, 0, 2)[0] == PassPlan(((0, 0, 0, 1, 2),), entering=(), leaving=((0, 0), (1, 0)))
    assert plan_for_stage(plan, replica, 2, 4)[0] == PassPlan(
        ((0, 0, 0, 1, 2),), entering=((0, 0), (1, 0)), leaving=((2, 0),)
    )
    assert plan_for_stage(plan, replica, 4, 5)[0] == PassPlan(((0, 0, 0, 1, 2),), entering=((2, 0),), leaving=())
    assert plan_for_stage(plan, replica, 2, 4)[1] == PassPlan(((0, 1, 2, 3, 4),), entering=(), leaving=())
