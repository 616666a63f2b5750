"""The routing plan of each step: rank 0 broadcasts it ahead, and every rank compares it with its own draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from skvr_dist.errors import UserError
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingPlan


class _Travelling:
    """The plan of one step on its way, and this rank's own draw of it."""

    def __init__(self, step: int, drawn: Tensor) -> None:
        self.step = step
        self.drawn = drawn
        self.received = drawn.clone()
        self.work: dist.Work | None = None


class PlanStream:
    """Plans of consecutive steps, the same on every rank.

    A plan goes out from global rank 0 as one small integer tensor over the host group, from rank 0 to the heads of the
    rows and from them to their rows. While step t runs, the plan of step t + 1 is on the second of these ways and that
    of step t + 2 on the first, so nobody waits for either and no device is synchronised. A plan is a function of seed
    and step alone (docs/draws.md), so every rank draws it too, and what it receives must be the same.

    Args:
        draw: the plan of a step (counted from 0).
        first_step: the step of the first plan.
    """

    def __init__(self, draw: Callable[[int], RoutingPlan], mesh: Mesh, *, first_step: int) -> None:
        self._draw = draw
        self._mesh = mesh
        self._to_heads = self._sent_to_heads(first_step)
        with naming_the_operation(mesh, "the broadcast of the first routing plan"):
            self._to_rows = self._forwarded(first_step + 1)

    def _sent_to_heads(self, step: int) -> _Travelling:
        plan = _Travelling(step, torch.from_numpy(self._draw(step).donors))
        plan.work = self._mesh.host_group.start_to_heads(plan.received)
        return plan

    def _forwarded(self, following: int) -> _Travelling:
        """Send the plan that the heads have on to their rows, and rank 0's of the step `following` to the heads."""
        plan = self._to_heads
        _arrive(plan)
        plan.work = self._mesh.host_group.start_to_rows(plan.received)
        self._to_heads = self._sent_to_heads(following)
        return plan

    def next(self) -> RoutingPlan:
        """The plan of the next step; those of the two after it are on their way when this returns.

        Raises:
            UserError: this rank draws another plan than rank 0.
            RunInterrupted: a rank did not take part in time.
        """
        plan = self._to_rows
        with naming_the_operation(self._mesh, f"the broadcast of the routing plan of step {plan.step + 1}"):
            _arrive(plan)
            if not torch.equal(plan.received, plan.drawn):
                raise UserError(self._difference(plan))
            self._to_rows = self._forwarded(plan.step + 2)
        return RoutingPlan(plan.received.numpy())

    def _difference(self, plan: _Travelling) -> str:
        micro_batch, layer = (plan.received != plan.drawn).nonzero()[0].tolist()
        return (
            f"routing plan of step {plan.step + 1}, micro-batch {micro_batch}: rank {self._mesh.rank} draws that "
            f"layer {layer} reads layer {plan.drawn[micro_batch, layer]}, rank 0 sent layer "
            f"{plan.received[micro_batch, layer]}; the memory or network of one of them is not to be trusted, or "
            f"their versions of numpy differ: take that host out and start again"
        )

    def close(self) -> None:
        """Receive the plans that are on their way and will not be used, so that no rank leaves another waiting."""
        with naming_the_operation(self._mesh, "the broadcast of the last routing plans"):
            _arrive(self._to_rows)
            _arrive(self._to_heads)


def _arrive(plan: _Travelling) -> None:
    if plan.work is not None:
        plan.work.wait()
