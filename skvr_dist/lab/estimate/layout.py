"""The estimate of a whole run: every stage's memory and traffic under the run's own plans, and the step's time."""

from __future__ import annotations

from dataclasses import dataclass

from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.lab.estimate.memory import Memory, peak_memory
from skvr_dist.lab.estimate.rank import RankSizes
from skvr_dist.lab.estimate.speed import Rates, Speed, predict
from skvr_dist.lab.estimate.traffic import Traffic, step_traffic
from skvr_dist.train.plans import plan_of_step

GIB = 2**30


@dataclass(frozen=True)
class StageEstimate:
    """One stage's rank."""

    rank: RankSizes
    memory: Memory
    """The highest peak of the plans that were drawn."""
    traffic: Traffic
    """Mean bytes of a step."""


@dataclass(frozen=True)
class Estimate:
    """A run on a number of GPUs."""

    config: Config
    gpus: int
    stages: list[StageEstimate]
    speed: Speed

    @property
    def worst(self) -> StageEstimate:
        """The stage that holds most."""
        return max(self.stages, key=lambda stage: stage.memory.total)

    @property
    def layout(self) -> str:
        """The layout in words."""
        parallel, rank = self.config.parallel, self.stages[0].rank
        words = [f"{rank.stages} stages x {rank.replicas} replicas x {rank.tensor} tensor-parallel"]
        words += [f"ZeRO-{parallel.zero_stage}", f"micro-batches of {self.config.train.micro_batch_size}"]
        if parallel.activation_checkpointing.recompute != "none":
            words.append(f"{parallel.activation_checkpointing.recompute} recomputed")
        return ", ".join(words)

    @property
    def short(self) -> str:
        """The layout in a few letters, for tables."""
        parallel, rank = self.config.parallel, self.stages[0].rank
        words = [f"PP{rank.stages} x DP{rank.replicas} x TP{rank.tensor}" + " SP" * parallel.sequence_parallel]
        words += [f"ZeRO-{parallel.zero_stage}", f"micro-batch {self.config.train.micro_batch_size}"]
        if parallel.activation_checkpointing.recompute != "none":
            words.append(f"recompute {parallel.activation_checkpointing.recompute}")
        return ", ".join(words)


def require_estimable(config: Config, gpus: int) -> None:
    """Check that closed forms exist for a configuration and that it can use that many GPUs.

    Raises:
        UserError: it cannot, with the nearest number that can; or something is used that has no closed form here.
    """
    if config.offloads_optimizer:
        raise UserError("deepspeed.zero_optimization.offload_optimizer has no estimate yet; leave it out")
    if config.distillation:
        raise UserError("distillation has no estimate yet; set distillation to null")
    if config.train.only:
        raise UserError("train.only has no estimate yet; set it to null")
    if config.model.attention == "eager":
        raise UserError("model.attention eager keeps all scores, which has no estimate; use sdpa, flash or auto")
    require_usable(config, gpus)


def require_usable(config: Config, gpus: int) -> None:
    """Raises `UserError` if the layout of a configuration cannot use that many GPUs, with the nearest number it can."""
    cell = config.parallel.pipeline * config.parallel.tensor
    usable = [n * cell for n in range(1, config.num_micro_batches + 1) if _divides(config, n)]
    if not usable:
        raise UserError(
            f"data.lanes {config.data.lanes} is not a multiple of train.micro_batch_size "
            f"{config.train.micro_batch_size}, so no number of replicas can read lanes of its own; change one of them"
        )
    if gpus not in usable:
        below = [str(n) for n in usable if n < gpus][-1:]
        above = [str(n) for n in usable if n > gpus][:1]
        raise UserError(
            f"--gpus {gpus} cannot be laid out as parallel.pipeline {config.parallel.pipeline} x parallel.tensor "
            f"{config.parallel.tensor} x replicas that share {config.num_micro_batches} micro-batches and "
            f"data.lanes {config.data.lanes} equally; the nearest that can: {' and '.join(below + above)}"
        )


def _divides(config: Config, replicas: int) -> bool:
    micro_batch = config.train.micro_batch_size
    return config.num_micro_batches % replicas == 0 and config.data.lanes % (micro_batch * replicas) == 0


def estimate(config: Config, gpus: int, rates: Rates, plans: int = 4) -> Estimate:
    """Estimate a run.

    Args:
        plans: steps, from all over the run, whose routing plans are drawn.

    Raises:
        UserError: see `require_estimable`.
    """
    require_estimable(config, gpus)
    steps = sorted({number * config.train.steps // plans for number in range(plans)})
    drawn = [plan_of_step(config, step) for step in steps]
    stages, all_rows = [], []
    for stage in range(config.parallel.pipeline):
        rank = RankSizes(config, gpus, stage)
        rows = [rank.rows(plan) for plan in drawn]
        memory = max((peak_memory(rank, each) for each in rows), key=lambda each: each.total)
        traffics = [step_traffic(rank, each) for each in rows]
        links = sorted({link for traffic in traffics for link in traffic})
        traffic = {link: round(sum(each.get(link, 0) for each in traffics) / len(traffics)) for link in links}
        stages.append(StageEstimate(rank, memory, traffic))
        all_rows.append([row for each in rows for row in each])
    speed = predict([each.rank for each in stages], all_rows, [each.traffic for each in stages], rates)
    return Estimate(config, gpus, stages, speed)
