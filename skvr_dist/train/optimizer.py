"""AdamW, and the learning rate that it is given before each step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from skvr_dist.config.train import TrainConfig
from skvr_dist.train.schedules import learning_rate_factor, peak_learning_rate


def build_optimizer(train: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over parameter groups; each weight and its moments pass through one kernel, once."""
    return torch.optim.AdamW(
        groups,
        lr=peak_learning_rate(train),
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        fused=True,
    )


def build_scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The learning-rate schedule of an optimizer, one step per optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(train, step))


def set_step(scheduler: LambdaLR, step: int) -> None:
    """Set the learning rate that the configuration gives after `step` steps."""
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
