"""What one stage needs to know of a step's routing plan, worked out once before the step.

Shapes: Q micro-batches of the global batch, R rows of donors of a micro-batch, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.passes import ONCE, Pass, StepPasses
from skvr_dist.routing import KVPart, RoutingPlan, crossing_parts


@dataclass(frozen=True)
class PassPlan:
    """One pass of a micro-batch, as a stage sees it."""

    donors: tuple[tuple[int, ...], ...]
    """[R][L], the layer that each layer of the whole decoder reads, for all of its sequences or for each."""
    entering: tuple[KVPart, ...]
    """Keys and values that come from the stage before, ascending; none on the first stage."""
    leaving: tuple[KVPart, ...]
    """Those that go to the stage after, received ones among them, ascending; none on the last."""
    run: Pass = ONCE[0]
    """What the pass is for."""
    is_first: bool = True
    """Whether it is the first one of its micro-batch."""


def plan_for_stage(
    plan: RoutingPlan, mesh: Mesh, start: int, stop: int, passes: StepPasses | None = None
) -> tuple[PassPlan, ...]:
    """The passes of this rank's micro-batches, in the order in which it runs them.

    Replica r of R runs the global micro-batches r, r + R, r + 2R, ..., all passes of one before the next. A frozen
    teacher's are at full retention, where no keys and values cross.

    Args:
        plan: of the Q micro-batches of the global batch.
        start, stop: the stage's first layer, and the first one after it.
        passes: of each of the Q micro-batches; None: one each.
    """
    mine = range(mesh.dp_rank, plan.num_micro_batches, mesh.dp_size)
    found = []
    for q in mine:
        for number, each in enumerate(passes[q] if passes else ONCE):
            donors = (each.donors,) if each.donors else plan.of_micro_batch(q)
            entering, leaving = ((), ()) if each.by_teacher else _crossing(donors, start, stop)
            found.append(PassPlan(donors, entering, leaving, each, is_first=number == 0))
    return tuple(found)


def _crossing(
    donors: tuple[tuple[int, ...], ...], start: int, stop: int
) -> tuple[tuple[KVPart, ...], tuple[KVPart, ...]]:
    return crossing_parts(donors, start), crossing_parts(donors, stop)
