"""Whether the schedules of a run go on where those of the checkpoint were that it resumes from."""

from __future__ import annotations

import math

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.schedule import in_words, value_at
from skvr_dist.train.schedules import learning_rate_factor, routing_rates

ROUTING_SCHEDULES = ("cross_layer_prob", "full_retention_share")
"""Keys of the routing section that may be schedules."""
_TRAIN_KEYS = (
    "steps",
    "schedule_steps",
    "warmup_steps",
    "learning_rate_from_step",
    "learning_rate_decay",
    "decay_steps",
    "min_learning_rate_ratio",
    "learning_rate",
)
"""Keys of the train section that decide what schedules are worth at a step; the peak of the learning rate scales it."""


def require_begun(config: Config, step: int) -> None:
    """Refuse a learning rate whose warm-up begins after the steps that are done: it would be 0 until then.

    Raises:
        UserError: names both steps.
    """
    begin = config.train.learning_rate_from_step
    if begin > step:
        raise UserError(
            f"train.learning_rate_from_step is {begin}, but the run goes on from step {step}; give {step}, or a "
            f"train.resume at step {begin} or later"
        )


def require_same_schedule(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse schedules that would jump at the step that follows a checkpoint, unless `train.on_resume` says so.

    Raises:
        UserError: names the schedule, its values there and here, and the choices.
    """
    if config.train.on_resume == "other_schedule":
        return
    for key in ROUTING_SCHEDULES:
        there, here = getattr(checkpoint.config.routing, key), getattr(config.routing, key)
        if there != here:
            raise UserError(
                f"checkpoint {checkpoint.folder} has routing.{key} {in_words(there)}, the configuration "
                f"{in_words(here)}; give the checkpoint's own value, start a new run, or change it from step "
                f"{checkpoint.step} on with train.on_resume=other_schedule"
            )
    jumps = schedule_jumps(checkpoint, config)
    if not jumps:
        return
    step, before = checkpoint.step, _with_schedules_of(checkpoint, config).train
    different = [
        f"train.{key} ({in_words(getattr(before, key))} there, {in_words(getattr(config.train, key))} here)"
        for key in _TRAIN_KEYS
        if getattr(before, key) != getattr(config.train, key)
    ]
    raise UserError(
        f"checkpoint {checkpoint.folder} and the configuration differ in {', '.join(different)}: at step {step + 1} "
        f"that would move {' and '.join(jumps)}; go on as the checkpoint's schedules do with its own values (train."
        f"schedule_steps={before.horizon} keeps their end, however long the run is), or say train.on_resume="
        f"other_schedule to take them as they are here, with train.learning_rate_from_step={step} too for a learning "
        f"rate that begins anew"
    )


def schedule_jumps(checkpoint: Checkpoint, config: Config) -> list[str]:
    """Schedules that are worth something else at the next step than under the keys of a checkpoint, in words."""
    step = checkpoint.step
    if step >= config.train.steps:  # no step follows
        return []
    there, here = _values(_with_schedules_of(checkpoint, config), step), _values(config, step)
    return [
        f"{name} from {there[name]:.4g} to {here[name]:.4g}"
        for name in here
        if not math.isclose(there[name], here[name], rel_tol=1e-9)  # a level value, and where a curve begins
    ]


def _with_schedules_of(checkpoint: Checkpoint, config: Config) -> Config:
    """A configuration with a checkpoint's schedules in place of its own."""
    stored = checkpoint.config
    train = config.train.model_copy(update={key: getattr(stored.train, key) for key in _TRAIN_KEYS})
    routing = config.routing.model_copy(update={key: getattr(stored.routing, key) for key in ROUTING_SCHEDULES})
    return config.model_copy(update={"train": train, "routing": routing, "distillation": stored.distillation})


def _values(config: Config, step: int) -> dict[str, float]:
    """Every schedule at a step; the learning rate over its peak, which may change freely."""
    peak_share = learning_rate_factor(config.train, step)
    rates = {f"routing.{name}": value for name, value in routing_rates(config, step).items()}
    weight = 0.0 if config.distillation is None else value_at(config.distillation.weight, step, config.train.horizon)
    return {"the learning rate over its peak": peak_share, **rates, "distillation.weight": weight}
