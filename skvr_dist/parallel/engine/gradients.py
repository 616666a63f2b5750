"""Where gradients live in each of DeepSpeed's optimizers, between the last backward pass and the optimizer step.

ZeRO-0      in `grad` of the parameters
ZeRO-1, 2   this rank's partitions, by parameter group, in `averaged_gradients`
bf16 ZeRO-1 whole and in fp32, flat by parameter group (BF16_Optimizer), where each goes as it comes
ZeRO-3      this rank's partitions, by subgroup, in `averaged_gradients`
offloaded   in `grad` of the fp32 masters on the host, with ZeRO-1, 2 and 3
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import get_norm_dtype
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn


def gradient_tensors(optimizer: Any, module: nn.Module) -> list[Tensor]:
    """Every gradient that this rank holds before the optimizer step.

    Args:
        optimizer: the one that DeepSpeed made (`engine.optimizer`).
        module: what it trains.
    """
    own = [p.grad for p in module.parameters() if p.grad is not None]
    averaged = [t for group in getattr(optimizer, "averaged_gradients", {}).values() for t in group or ()]
    flat = getattr(optimizer, "fp32_groups_gradients_flat", [])  # bf16 with ZeRO-1
    masters = [
        *getattr(optimizer, "single_partition_of_fp32_groups", []),  # ZeRO-1 and ZeRO-2
        *getattr(optimizer, "fp32_partitioned_groups_flat", []),  # ZeRO-3
    ]
    offloaded = [master.grad for master in masters if master.grad is not None]
    if offloaded:
        get_accelerator().synchronize()  # they may still be on their way to the host
    return [*own, *averaged, *flat, *offloaded]


def _held_gradients(optimizer: Any, weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """What this rank holds of the gradients of some weights once they are reduced over the replicas, to be changed.

    Args:
        weights: as they are in the module; those of which it holds nothing are left out.
    """
    found: dict[nn.Parameter, Tensor | None]
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        mappings = {weight: getattr(weight, "_hp_mapping", None) for weight in weights}
        found = {
            weight: mapping.get_lp_grad_fragment(weight._index_in_param_group)  # type: ignore[attr-defined]
            for weight, mapping in mappings.items()
            if mapping is not None
        }
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and optimizer.offload_optimizer:
        places = {weight: optimizer.grad_position[optimizer.get_param_id(weight)] for weight in weights}
        masters = optimizer.fp32_partitioned_groups_flat
        found = {w: masters[group].grad.narrow(0, start, count) for w, (group, start, count) in places.items()}
    elif isinstance(optimizer, BF16_Optimizer | DeepSpeedZeroOptimizer_Stage3):
        is_bf16 = isinstance(optimizer, BF16_Optimizer)
        groups = optimizer.bf16_groups if is_bf16 else optimizer.fp16_groups
        gradients = optimizer.fp32_groups_gradients if is_bf16 else optimizer.averaged_gradients
        pairs = (zip(group, gradients[number], strict=True) for number, group in enumerate(groups))
        of_all = dict(chain.from_iterable(pairs))
        found = {weight: of_all[weight] for weight in weights}
    else:
        found = {weight: weight.grad for weight in weights}
    return {weight: each for weight, each in found.items() if each is not None and each.numel()}


@torch.no_grad()
def sum_partial_gradients(optimizer: Any, weights: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add gradients up over the tensor-parallel ranks, once in a step and all at once; collective over them.

    They hold shards of equal shapes in the same order, so the same parts of the same weights.

    Args:
        weights: those whose shard is `partial`.
    """
    held = _held_gradients(optimizer, weights) if weights else {}
    if not held:
        return
    accelerator = get_accelerator()
    if any(each.device.type != accelerator.device_name() for each in held.values()):
        accelerator.synchronize()  # they may still be on their way to the host
    total = torch.cat([each.flatten() for each in held.values()]).to(accelerator.current_device_name())
    dist.all_reduce(total, group=group)
    wholes = total.split([each.numel() for each in held.values()])
    torch._foreach_copy_(
        list(held.values()), [whole.view_as(each) for each, whole in zip(held.values(), wholes, strict=True)]
    )
    norms = getattr(optimizer, "norm_for_param_grads", {})
    if norms:  # taken when a gradient was offloaded
        for weight, whole in zip(held, wholes, strict=True):
            norms[optimizer.get_param_id(weight)] = whole.to(get_norm_dtype()).norm()


def add_gradients_in_one_pass(optimizer: Any) -> None:
    """Let the optimizer of bf16 with ZeRO-1 add each bf16 gradient to the fp32 one as it is; others are left alone.

    DeepSpeed makes an fp32 copy of it first: 8 bytes more of traffic for each parameter and micro-batch, and room for
    the largest one. The sums are the same to the bit.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return

    def add(parameter: Any, group: int, number: int, clear_lp_grads: bool) -> None:
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][number]
        total.add_(parameter.grad.view(total.shape))
        parameter._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][number] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    optimizer._update_hp_grad = add


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """The elements of some small tensors, one tensor after the other; those on a device are read at once.

    Every read waits until the device has done all that it was given before.
    """
    flat = [tensor.detach().flatten().double() for tensor in tensors]
    away = [each for each in flat if not each.is_cpu]
    if away:
        read = iter(torch.cat(away).cpu().split([len(each) for each in away]))
        flat = [each if each.is_cpu else next(read) for each in flat]
    return torch.cat(flat).tolist() if flat else []


@torch.no_grad()
def scale_gradients(optimizer: Any, module: nn.Module, factor: float) -> None:
    """Multiply the gradients that the optimizer step is about to use."""
    for gradient in gradient_tensors(optimizer, module):
        gradient.mul_(factor)
    norms = getattr(optimizer, "norm_for_param_grads", {})  # taken when a gradient was offloaded
    for parameter, norm in norms.items():
        norms[parameter] = norm * factor


def clip_by_global_norm(module: nn.Module, max_norm: float, group: dist.ProcessGroup) -> Tensor:
    """Clip the gradients of ZeRO-0, which are whole on every rank; DeepSpeed's other optimizers clip their own.

    Args:
        max_norm: the norm to clip to; 0 clips nothing.
        group: the ranks of all stages and shards, one of each.

    Returns:
        the norm before, []: over all stages and shards, what several ranks hold counted once.
    """
    counted = [p.grad for p in module.parameters() if p.grad is not None and not getattr(p, PIPE_REPLICATED)]
    norm = torch.nn.utils.get_total_norm(counted).to(get_accelerator().current_device_name())
    if group.size() > 1:
        total = norm.square()
        dist.all_reduce(total, group=group)
        norm = total.sqrt()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(module.parameters()), max_norm, norm)
    return norm


def drop_gradients(optimizer: Any) -> None:
    """Forget the gradients of a step, as DeepSpeed's optimizers do with those that overflow.

    Their own code for it is inside their `step`, except ZeRO-3's. The other optimizers, torch's and the one of bf16
    with ZeRO-1, hold nothing that the engine does not clear after every step.
    """
    if hasattr(optimizer, "_overflow_clean_up"):  # ZeRO-3
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(prev_scale=optimizer.loss_scale)
    elif hasattr(optimizer, "averaged_gradients"):  # ZeRO-1 and ZeRO-2
        optimizer.micro_step_id = -1
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None


def gather_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of this rank's shard of a weight, whatever ZeRO stage holds it; collective over the replicas."""
    return safe_get_full_grad(parameter)
