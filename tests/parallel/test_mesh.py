"""Where ranks are: the mesh's own arithmetic against DeepSpeed's topology, and what a stage makes of a plan."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.lab.verify.cases import SHAPE
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh, ranks_along
from skvr_dist.parallel.pipeline.step_plan import MicroBatchPlan, plan_for_stage
from skvr_dist.routing import RoutingPlan, fixed_plan


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), (1, 2, 3), (1, 2, 4))))
def test_ranks_lie_as_in_deepspeeds_topology(sizes: tuple[int, int, int]) -> None:
    pp_size, dp_size, tp_size = sizes
    topology = PipeModelDataParallelTopology(num_pp=pp_size, num_dp=dp_size, num_mp=tp_size)
    assert ranks_along("pp", sizes) == topology.get_axis_comm_lists("pipe")
    assert ranks_along("dp", sizes) == topology.get_axis_comm_lists("data")
    assert ranks_along("tp", sizes) == topology.get_axis_comm_lists("model")


def look_around() -> tuple[list[int], list[int], list[list[int]], str]:
    """Coordinates, the ranks of all stages at this place, all pipelines, and the name."""
    mesh = Mesh.build(ParallelConfig(pipeline=2, tensor=2), ModelConfig.model_validate(SHAPE))
    coordinates = [mesh.pp_rank, mesh.dp_rank, mesh.tp_rank]
    return coordinates, [mesh.stage_rank(stage) for stage in range(2)], mesh.pipelines(), mesh.name


def test_every_rank_knows_its_coordinates() -> None:
    for rank, (coordinates, stages, pipelines, name) in enumerate(run_ranks(8, look_around)):
        assert coordinates == [rank // 4, rank // 2 % 2, rank % 2]
        assert stages == [rank % 4, rank % 4 + 4]
        assert pipelines == [[0, 4], [1, 5], [2, 6], [3, 7]]
        assert name == f"rank {rank} (stage {coordinates[0]}, replica {coordinates[1]}, tensor {coordinates[2]})"


def test_what_enters_and_leaves_a_stage() -> None:
    replica: Any = SimpleNamespace(dp_rank=1, dp_size=2)
    donors = fixed_plan((0, 1, 2, 3, 4), 4).donors
    donors[1] = 0, 0, 0, 1, 2
    plan = RoutingPlan(donors)
    assert plan_for_stage(plan, replica, 0, 2)[0] == MicroBatchPlan((0, 0, 0, 1, 2), entering=(), leaving=(0, 1))
    assert plan_for_stage(plan, replica, 2, 4)[0] == MicroBatchPlan((0, 0, 0, 1, 2), entering=(0, 1), leaving=(2,))
    assert plan_for_stage(plan, replica, 4, 5)[0] == MicroBatchPlan((0, 0, 0, 1, 2), entering=(2,), leaving=())
    assert plan_for_stage(plan, replica, 2, 4)[1] == MicroBatchPlan((0, 1, 2, 3, 4), entering=(), leaving=())
