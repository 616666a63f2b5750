"""The routing plan of each step, drawn once and broadcast a step ahead."""

from __future__ import annotations

import torch
import torch.distributed as dist

from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingConfig, RoutingPlan, draw_plan


class PlanStream:
    """Plans of consecutive steps, the same on every rank.

    Global rank 0 draws the plan of step t + 1 while step t runs, and broadcasts it as one small integer tensor over
    the host group, so that nobody waits for it and no device is synchronised.
    """

    def __init__(
        self, routing: RoutingConfig, mesh: Mesh, *, num_layers: int, num_micro_batches: int, seed: int, first_step: int
    ) -> None:
        self._routing = routing
        self._mesh = mesh
        self._num_layers = num_layers
        self._num_micro_batches = num_micro_batches
        self._seed = seed
        self._step = first_step
        self._send_ahead()

    def _send_ahead(self) -> None:
        shape = (self._num_micro_batches, self._num_layers)
        if self._mesh.rank == 0:
            plan = draw_plan(
                self._routing,
                num_layers=self._num_layers,
                num_micro_batches=self._num_micro_batches,
                seed=self._seed,
                step=self._step,
            )
            self._donors = torch.from_numpy(plan.donors)
        else:
            self._donors = torch.empty(shape, dtype=torch.int64)
        self._work = dist.broadcast(self._donors, src=0, group=self._mesh.host_group, async_op=True)

    def next(self) -> RoutingPlan:
        """The plan of the next step; the one after it is on its way when this returns."""
        self._work.wait()
        plan = RoutingPlan(self._donors.numpy())
        self._step += 1
        self._send_ahead()
        return plan

    def close(self) -> None:
        """Take the plan that is on its way and will not be used, so that no rank leaves another waiting."""
        self._work.wait()
