"""The passes of each step of a run: a function of the configuration and the step, the same on every rank."""

from __future__ import annotations

from skvr_dist.config.distillation import ROUTED, DistillationConfig
from skvr_dist.config.tree import Config
from skvr_dist.parallel.pipeline.passes import ONCE, Pass, Role, StepPasses
from skvr_dist.routing import CacheStrategy
from skvr_dist.schedule import value_at


def passes_of_step(config: Config, step: int) -> StepPasses:
    """The passes of each micro-batch of a step (the first is 0).

    Of Q micro-batches, D are distilled: step t takes D in a row from t * D on, and goes on at the first one after the
    last. So all take turns, whatever data each has, and each of R replicas, which runs every R-th one, has D / R.
    """
    count, distilled = config.num_micro_batches, config.num_distilled
    if config.distillation is None:
        return [ONCE] * count
    passes = _distilled(config, config.distillation, step)
    return [passes if (q - step * distilled) % count < distilled else ONCE for q in range(count)]


def _distilled(config: Config, distillation: DistillationConfig, step: int) -> tuple[Pass, ...]:
    """The passes of a distilled micro-batch."""
    layers, profiles = config.model.num_hidden_layers, config.evaluate.profiles
    full_weight = distillation.full_weight if distillation.is_own else 0.0
    total = full_weight + len(distillation.passes)
    full = CacheStrategy.full(layers).kv_source_layers if distillation.is_own else None
    target = Pass(full, Role.TARGET, by_teacher=not distillation.is_own, weight=full_weight / total)
    share = value_at(distillation.weight, step, config.train.horizon)
    students = [
        Pass(
            None if name == ROUTED else CacheStrategy.parse(name, layers, profiles).kv_source_layers,
            Role.STUDENT,
            weight=1 / total,
            divergence=share,
        )
        for name in distillation.passes
    ]
    return (target, *students)
