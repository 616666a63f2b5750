"""The routing plan of each step, drawn once, broadcast a step ahead, and compared over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from skvr_dist.errors import UserError
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.mesh import Mesh, agree
from skvr_dist.routing import RoutingPlan

_FIRST_STEPS_COMPARED = 3


class PlanStream:
    """Plans of consecutive steps, the same on every rank.

    Global rank 0 draws the plan of step t + 1 while step t runs, and broadcasts it as one small integer tensor over
    the host group, so that nobody waits for it and no device is synchronised.

    Args:
        draw: the plan of a step (counted from 0); used on rank 0 only.
        shape: micro-batches of the global batch, and layers.
        first_step: the step of the first plan.
        compare_every_steps: how often all ranks compare what they received, besides the first steps.
    """

    def __init__(
        self,
        draw: Callable[[int], RoutingPlan],
        mesh: Mesh,
        *,
        shape: tuple[int, int],
        first_step: int,
        compare_every_steps: int,
    ) -> None:
        self._draw = draw
        self._mesh = mesh
        self._shape = shape
        self._first_step = self._step = first_step
        self._compare_every_steps = compare_every_steps
        self._send_ahead()

    def _send_ahead(self) -> None:
        drawn = self._mesh.rank == 0
        self._donors = torch.from_numpy(self._draw(self._step).donors) if drawn else torch.empty(self._shape).long()
        self._work = dist.broadcast(self._donors, src=0, group=self._mesh.host_group, async_op=True)

    def next(self) -> RoutingPlan:
        """The plan of the next step; the one after it is on its way when this returns.

        Raises:
            UserError: a rank holds another plan than rank 0.
            RunInterrupted: a rank did not take part in time.
        """
        with naming_the_operation(self._mesh, f"the broadcast of the routing plan of step {self._step + 1}"):
            self._work.wait()
            first = self._step - self._first_step < _FIRST_STEPS_COMPARED
            if first or self._step % self._compare_every_steps == 0:
                self._compare(self._donors)
            plan = RoutingPlan(self._donors.numpy())
            self._step += 1
            self._send_ahead()
        return plan

    def _compare(self, donors: Tensor) -> None:
        """Compare a hash of the plan over all ranks, and the plans themselves only if it differs; collective."""
        if agree(donors.numpy().tobytes(), self._mesh.host_group):
            return
        plans = [torch.empty_like(donors) for _ in range(self._mesh.world_size)]
        dist.all_gather(plans, donors, group=self._mesh.host_group)
        rank = next(rank for rank, plan in enumerate(plans) if not torch.equal(plan, plans[0]))
        micro_batch, layer = (plans[rank] != plans[0]).nonzero()[0].tolist()
        raise UserError(
            f"routing plan of step {self._step + 1}, micro-batch {micro_batch}: on rank {rank} layer {layer} reads "
            f"layer {plans[rank][micro_batch, layer]}, on rank 0 layer {plans[0][micro_batch, layer]}; its memory or "
            f"network is not to be trusted, take that host out and start again"
        )

    def close(self) -> None:
        """Receive the plan that is on its way and will not be used, so that no rank leaves another waiting."""
        with naming_the_operation(self._mesh, "the broadcast of the last routing plan"):
            self._work.wait()
