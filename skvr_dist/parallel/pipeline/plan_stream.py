"""The routing plan of each step: rank 0 broadcasts it ahead, and every rank compares it with its own draw."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist

from skvr_dist.errors import UserError
from skvr_dist.host_group import HostGroup
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingPlan


class _Travelling:
    """The plan of one step on its way, and this rank's own draw of it."""

    def __init__(self, step: int, drawn: RoutingPlan, group: HostGroup) -> None:
        self.step = step
        self.plan = drawn
        self.drawn = torch.from_numpy(drawn.donors)
        self.received = self.drawn.clone()
        self._group = group
        self._hop = 0
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Begin the next hop."""
        self._work = self._group.start_hop(self._hop, self.received)
        self._hop += 1

    def arrive(self) -> None:
        """Wait for the end of the hop that was begun."""
        if self._work is not None:
            self._work.wait()


class PlanStream:
    """Plans of consecutive steps, the same on every rank.

    Plans go out from global rank 0 as small integer tensors, along one axis of the host group's grid after the other.
    While step t runs, the plan of step t + 1 is on the last of these hops, that of step t + 2 on the one before, and so
    on; so nobody waits for them and no device is synchronised. A plan is a function of seed and step alone
    (docs/draws.md), so every rank draws it too, and what it receives must be the same.

    Args:
        draw: the plan of a step (counted from 0).
        first_step: the step of the first plan.
    """

    def __init__(self, draw: Callable[[int], RoutingPlan], mesh: Mesh, *, first_step: int) -> None:
        self._draw = draw
        self._mesh = mesh
        self._next_to_send = first_step
        self._under_way: deque[_Travelling] = deque()  # those that left first, first
        with naming_the_operation(mesh, "the broadcast of the first routing plan"):
            for _ in range(mesh.host_group.hops):
                self._advance()

    def _advance(self) -> None:
        """Send every plan that is under way one hop further, and a new one out."""
        for plan in self._under_way:
            plan.arrive()
            plan.start()
        drawn = self._draw(self._next_to_send)
        self._under_way.append(_Travelling(self._next_to_send, drawn, self._mesh.host_group))
        self._under_way[-1].start()
        self._next_to_send += 1

    def next(self) -> RoutingPlan:
        """The plan of the next step; those of the steps after it are on their way when this returns.

        Raises:
            UserError: this rank draws another plan than rank 0.
            RunInterrupted: a rank did not take part in time.
        """
        plan = self._under_way.popleft()
        with naming_the_operation(self._mesh, f"the broadcast of the routing plan of step {plan.step + 1}"):
            plan.arrive()
            if not torch.equal(plan.received, plan.drawn):
                raise UserError(self._difference(plan))
            self._advance()
        return dataclasses.replace(plan.plan, donors=plan.received.numpy())

    def _difference(self, plan: _Travelling) -> str:
        row, layer = (plan.received != plan.drawn).nonzero()[0].tolist()
        return (
            f"routing plan of step {plan.step + 1}, {plan.plan.place_of(row)}: rank {self._mesh.rank} draws that "
            f"layer {layer} reads layer {plan.drawn[row, layer]}, rank 0 sent layer "
            f"{plan.received[row, layer]}; the memory or network of one of them is not to be trusted, or "
            f"their versions of numpy differ: take that host out and start again"
        )

    def close(self) -> None:
        """Receive the plans that are on their way and will not be used, so that no rank leaves another waiting."""
        with naming_the_operation(self._mesh, "the broadcast of the last routing plans"):
            for plan in self._under_way:
                plan.arrive()
