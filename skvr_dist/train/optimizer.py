"""AdamW and its learning rate: linear warm-up, then cosine decay."""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from skvr_dist.config.tree import TrainConfig


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (the first is 0) as a share of the peak.

    The warm-up rises in equal parts and reaches the peak at its last step; the cosine ends at
    `min_learning_rate_ratio` with the run's last step.
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    decay_steps = max(train.steps - 1 - train.warmup_steps, 1)
    progress = min((step - train.warmup_steps) / decay_steps, 1.0)
    floor = train.min_learning_rate_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(train: TrainConfig, groups: list[dict[str, object]]) -> torch.optim.AdamW:
    """AdamW over parameter groups."""
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
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
