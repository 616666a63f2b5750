"""What one stage needs to know of a step's routing plan, worked out once before the step.

Shapes: Q micro-batches of the global batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingPlan, crossing_layers


@dataclass(frozen=True)
class MicroBatchPlan:
    """The routing of one micro-batch, as a stage sees it."""

    donors: tuple[int, ...]
    """[L], the layer that each layer of the whole decoder reads."""
    entering: tuple[int, ...]
    """Layers whose keys and values come from the stage before, ascending; none on the first stage."""
    leaving: tuple[int, ...]
    """Layers whose keys and values go to the stage after, received ones among them, ascending; none on the last."""


def plan_for_stage(plan: RoutingPlan, mesh: Mesh, start: int, stop: int) -> tuple[MicroBatchPlan, ...]:
    """The plan of this rank's micro-batches, in the order in which it runs them.

    Replica r of R runs the global micro-batches r, r + R, r + 2R, ...

    Args:
        plan: of the Q micro-batches of the global batch.
        start, stop: the stage's first layer, and the first one after it.
    """
    rows = plan.donors[mesh.dp_rank :: mesh.dp_size].tolist()
    return tuple(
        MicroBatchPlan(tuple(donors), crossing_layers(donors, start), crossing_layers(donors, stop)) for donors in rows
    )
