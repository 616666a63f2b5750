"""AdamW and its learning rate: linear warm-up, then cosine decay."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch.optim.lr_scheduler import LambdaLR

from skvr_dist.train.config import TrainConfig


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


@contextlib.contextmanager
def keep_settings(optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> Iterator[None]:
    """Load a checkpoint's optimizer state within this, and keep the configured settings instead of its own.

    Moments and step come from the checkpoint. Learning rate, betas, eps and weight decay stay as configured, so a
    resumed run goes on with the learning rate that the configuration gives that step.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    base_lrs = list(scheduler.base_lrs)
    yield
    scheduler.base_lrs = base_lrs
    for group, configured, factor in zip(optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True):
        group.update(configured)
        group["lr"] = configured["initial_lr"] * factor(scheduler.last_epoch)


def build_scheduler(train: TrainConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: learning_rate_factor(train, step))
