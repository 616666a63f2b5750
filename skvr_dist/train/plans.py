"""The routing plans of a run: one per optimizer step."""

from __future__ import annotations

import functools

from skvr_dist.config.tree import Config
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.plan_stream import PlanStream
from skvr_dist.routing import RoutingConfig, RoutingPlan, draw_plan


def plan_of_step(config: Config, step: int, routing: RoutingConfig | None = None) -> RoutingPlan:
    """The routing plan of a step (the first is 0), under the configuration's own routing or another."""
    return draw_plan(
        routing or config.routing,
        num_layers=config.model.num_hidden_layers,
        num_micro_batches=config.num_micro_batches,
        seed=config.train.seed,
        step=step,
        schedule_steps=config.train.horizon,
        micro_batch_size=config.train.micro_batch_size,
    )


def plan_stream(config: Config, mesh: Mesh, first_step: int) -> PlanStream:
    """The plans from step `first_step` on, the same on every rank; collective."""
    return PlanStream(functools.partial(plan_of_step, config), mesh, first_step=first_step)
