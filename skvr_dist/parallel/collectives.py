"""Collectives over a tensor-parallel group, with their gradients: what a layer needs of other ranks.

They are the operations below torch's functional collectives, which can be compiled. None of them waits: what is started
is waited for where it is used, so that something can be computed meanwhile. The functions around these operations would
wrap each result in a tensor that waits by itself, at the host's cost.

Shapes: B batch, S sequence, D hidden, T tensor-parallel ranks, N outputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import distributed_c10d

_OPERATIONS = torch.ops._c10d_functional


class SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.group), None


class Sum(torch.autograd.Function):
    """The sum over the ranks; every rank's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class GatherSequence(torch.autograd.Function):
    """[B, S / T, D] of every rank to [B, S, D]; the gradient is summed over the ranks, and each keeps its positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sequence(all_gather(x, group), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _arrived(_started_reduce_scatter(grads[0], ctx.group)), None


class ScatterSequence(torch.autograd.Function):
    """The sum over the ranks of [B, S, D], of which each keeps its positions [B, S / T, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _arrived(_started_reduce_scatter(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sequence(all_gather(grads[0], ctx.group), grads[0]), None


class LinearsOfSequence(torch.autograd.Function):
    """Linear layers of one and the same hidden states [B, S / T, D] of every rank, gathered to [B, S, D].

    What is kept is this rank's positions. The backward pass gathers them again while it computes the gradient of the
    hidden states, and computes those of the weights while that one is summed over the ranks (arXiv 2205.05198, 4.2.2).

    Takes the hidden states, the group, then weight [N, D] and bias [N] (or None) of each layer; returns [B, S, N] of
    each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, weight: Tensor, *used: Tensor | None
    ) -> tuple[Tensor, ...]:
        # `weight` has a name of its own for the compiler's sake: without gradients it passes no ctx where there are as
        # many arguments as names, which are five here and never as many as weights and biases in pairs.
        weights, biases = (weight, *used[1::2]), used[0::2]
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        whole = _sequence(all_gather(x, group), x)
        return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wanted, group = ctx.needs_input_grad, ctx.group
        gathered = summed = None
        if any(wanted[2::2]):
            gathered = gather_again(x, grads[0], group.group_name)
        if wanted[0]:
            # From the last layer to the first, as autograd would have added them up.
            whole = grads[-1] @ weights[-1]
            for gradient, weight in zip(grads[-2::-1], weights[-2::-1], strict=True):
                whole = whole + gradient @ weight
            summed = _started_reduce_scatter(whole, group)
        flat = [gradient.flatten(0, 1) for gradient in grads]
        of_parameters: list[Tensor | None] = [None] * (2 * len(flat))
        if gathered is not None:
            inputs = _sequence(gathered, x).flatten(0, 1)
            of_parameters[0::2] = [
                each.t() @ inputs if want else None for each, want in zip(flat, wanted[2::2], strict=True)
            ]
        of_parameters[1::2] = [each.sum(0) if want else None for each, want in zip(flat, wanted[3::2], strict=True)]
        of_x = None if summed is None else _arrived(summed)
        return (of_x, None, *of_parameters)


@torch.library.custom_op("skvr_dist::gather_again", mutates_args=())
def gather_again(x: Tensor, gradient: Tensor, group: str) -> Tensor:
    """Start to gather x [B, S / T, D] in a backward pass; [T * B, S / T, D], to be waited for.

    An operation of its own, that seems to need a gradient: a compiler would take it for the gather of the forward pass
    else, and keep what that one has made.

    Args:
        gradient: any that the backward pass has got.
        group: its name.
    """
    return all_gather(x, _group_of(group))


@gather_again.register_fake
def _(x: Tensor, gradient: Tensor, group: str) -> Tensor:
    return x.new_empty((_group_of(group).size() * x.shape[0], *x.shape[1:]))


def _group_of(name: str) -> dist.ProcessGroup:
    return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(name))


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, concatenated along the first dimension in the order of the ranks."""
    return _arrived(all_gather(x, group))


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _arrived(all_reduce(x, group))


def _started_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start to sum x [B, S, D] over the ranks, of which this one gets its positions, [B, S / T, D] once it is there.

    Along the first dimension, as collectives want it, which for a batch of one moves nothing here.
    """
    batch, ranks = x.shape[0], group.size()
    return reduce_scatter(x.unflatten(1, (ranks, -1)).transpose(0, 1).reshape(ranks * batch, -1, x.shape[2]), group)


def _sequence(gathered: Tensor, part: Tensor) -> Tensor:
    """Gathered positions [T * B, S / T, D] of parts [B, S / T, D] as [B, S, D], once they are there."""
    return _arrived(gathered).unflatten(0, (-1, part.shape[0])).transpose(0, 1).flatten(1, 2)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start to sum x over the ranks; the result has to be waited for, as that of the two below."""
    started: Tensor = _OPERATIONS.all_reduce(x.contiguous(), "sum", group.group_name)
    return started


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start to gather x [N, ...] of all T ranks, [T * N, ...]."""
    started: Tensor = _OPERATIONS.all_gather_into_tensor(x.contiguous(), group.size(), group.group_name)
    return started


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start to sum x [T * N, ...] over the T ranks, of which each gets its part [N, ...]."""
    started: Tensor = _OPERATIONS.reduce_scatter_tensor(x.contiguous(), "sum", group.size(), group.group_name)
    return started


def _arrived(x: Tensor) -> Tensor:
    """What one of those has started, once it is there."""
    arrived: Tensor = _OPERATIONS.wait_tensor(x)
    return arrived
