"""The routing plan of each step: rank 0 broadcasts it a step ahead, and every rank compares it with its own draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from skvr_dist.errors import UserError
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingPlan


class PlanStream:
    """Plans of consecutive steps, the same on every rank.

    While step t runs, the plan of step t + 1 goes out from global rank 0 as one small integer tensor over the host
    group, so that nobody waits for it and no device is synchronised. A plan is a function of seed and step alone
    (docs/draws.md), so every rank draws it too, and what it receives must be the same.

    Args:
        draw: the plan of a step (counted from 0).
        first_step: the step of the first plan.
    """

    def __init__(self, draw: Callable[[int], RoutingPlan], mesh: Mesh, *, first_step: int) -> None:
        self._draw = draw
        self._mesh = mesh
        self._step = first_step
        self._send_ahead()

    def _send_ahead(self) -> None:
        self._drawn = torch.from_numpy(self._draw(self._step).donors)
        self._received = self._drawn.clone()
        self._work = dist.broadcast(self._received, src=0, group=self._mesh.host_group, async_op=True)

    def next(self) -> RoutingPlan:
        """The plan of the next step; the one after it is on its way when this returns.

        Raises:
            UserError: this rank draws another plan than rank 0.
            RunInterrupted: a rank did not take part in time.
        """
        with naming_the_operation(self._mesh, f"the broadcast of the routing plan of step {self._step + 1}"):
            self._work.wait()
            if not torch.equal(self._received, self._drawn):
                raise UserError(self._difference())
            plan = RoutingPlan(self._received.numpy())
            self._step += 1
            self._send_ahead()
        return plan

    def _difference(self) -> str:
        micro_batch, layer = (self._received != self._drawn).nonzero()[0].tolist()
        return (
            f"routing plan of step {self._step + 1}, micro-batch {micro_batch}: rank {self._mesh.rank} draws that "
            f"layer {layer} reads layer {self._drawn[micro_batch, layer]}, rank 0 sent layer "
            f"{self._received[micro_batch, layer]}; the memory or network of one of them is not to be trusted, or "
            f"their versions of numpy differ: take that host out and start again"
        )

    def close(self) -> None:
        """Receive the plan that is on its way and will not be used, so that no rank leaves another waiting."""
        with naming_the_operation(self._mesh, "the broadcast of the last routing plan"):
            self._work.wait()
