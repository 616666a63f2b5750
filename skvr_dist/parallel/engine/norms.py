"""DeepSpeed's gradient norm, taken before the update, so that the host reads it together with the loss.

DeepSpeed's optimizers take the global norm inside their `step` and look at it there: whether it is a number, whether it
is above the one to clip to. Each look waits until the device has done all that it was given. Here the same functions
take the norm first; the engine reads it when it reads the loss, and `step` gets it as a tensor of the host, at which
anyone may look without waiting.

Not with an offloaded optimizer, whose gradients are on the host anyway, nor with ZeRO-0, which the engine clips itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

_MASKING = (utils, stage_1_and_2, stage3)
"""Modules that know `mask_nan_or_inf_with_val_inplace` by that name."""


@torch.no_grad()
def take_global_norm(optimizer: Any) -> Tensor | None:
    """The norm [] that an optimizer's `step` would take of the gradients as they are; collective over all ranks.

    Returns:
        it, on the device, and -1 or infinity if it is not a number, as DeepSpeed has it; None where `step` takes it for
        itself.
    """
    with contextlib.ExitStack() as masks:
        for module in _MASKING:
            masks.enter_context(_replaced(module, "mask_nan_or_inf_with_val_inplace", _mask))
        if isinstance(optimizer, BF16_Optimizer):
            gradients, _ = optimizer.get_grads_for_norm()
            return utils.get_global_norm_of_tensors(gradients, mpu=optimizer.mpu, norm_type=optimizer.norm_type)
        if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
            return optimizer.scaled_global_norm()
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and not optimizer.offload_optimizer:
            return utils.combine_grad_norm_groups(optimizer._get_norm_groups())
    return None


@contextlib.contextmanager
def known_global_norm(optimizer: Any, norm: float | None) -> Iterator[None]:
    """Let an optimizer's `step` take a norm for that of its gradients, and look at it on the host.

    Args:
        norm: of what `take_global_norm` has taken it of; None where it has not.
    """
    if norm is None:
        yield
        return
    known = torch.tensor(norm, dtype=torch.float32)
    owner, name, found = {
        BF16_Optimizer: (bf16_optimizer, "get_global_norm_of_tensors", known),
        DeepSpeedZeroOptimizer: (optimizer, "scaled_global_norm", known),
        DeepSpeedZeroOptimizer_Stage3: (optimizer, "_get_norm_groups", [known]),
    }[type(optimizer)]
    with _replaced(owner, name, lambda *_, **__: found):
        yield


def _mask(norm: Tensor, **_: Any) -> None:
    """DeepSpeed's mark of a norm that is not a number, without its way over the host."""
    norm.masked_fill_(~norm.isfinite(), -1.0)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)  # none where it is a method of the owner's class
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
