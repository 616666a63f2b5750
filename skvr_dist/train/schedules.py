"""What the schedules of a run are worth at each step: a function of the step and the configuration alone.

Steps are counted from 0 here: step t is the one before which t steps are done.
"""

from __future__ import annotations

from skvr_dist.config.train import TrainConfig
from skvr_dist.config.tree import Config
from skvr_dist.schedule import bounds_of, interpolate, value_at


def peak_learning_rate(train: TrainConfig) -> float:
    """The learning rate, or the largest one of a schedule."""
    return bounds_of(train.learning_rate)[1]


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """The learning rate of a step as a share of the peak (`peak_learning_rate`).

    The warm-up rises in equal parts and reaches the peak at its last step; the decay begins at the peak and ends at
    `min_learning_rate_ratio` with the last step of the schedules, after which it stays there. Learning rates that are
    a schedule themselves are multiplied with the warm-up, and have no decay besides.
    """
    begin, last = train.learning_rate_from_step, train.horizon - 1
    warmed_up = begin + train.warmup_steps
    level = value_at(train.learning_rate, step, train.horizon) / peak_learning_rate(train)
    if step < warmed_up:
        return level * interpolate([(begin - 1, 0.0), (warmed_up - 1, 1.0)], step)
    if train.learning_rate_decay == "constant":
        return level
    falls_from = warmed_up if train.decay_steps is None else train.horizon - train.decay_steps
    fall = [(falls_from, 1.0), (max(last, falls_from + 1), train.min_learning_rate_ratio)]
    return interpolate(fall, step, train.learning_rate_decay)


def data_weights(config: Config, step: int) -> dict[str, float]:
    """The weights of sources that change over the run, at a step, by the source's name."""
    changing = {
        name: source.weight for name, source in config.data.train.items() if not isinstance(source.weight, float)
    }
    return {name: value_at(weight, step, config.train.horizon) for name, weight in changing.items()}


def routing_rates(config: Config, step: int) -> dict[str, float]:
    """The schedules of the routing section at a step, by key; nothing for a policy that draws nothing."""
    routing, steps = config.routing, config.train.horizon
    if routing.cross_layer_prob is None:
        return {}
    return {
        "cross_layer_prob": value_at(routing.cross_layer_prob, step, steps),
        "full_retention_share": value_at(routing.full_retention_share, step, steps),
    }
