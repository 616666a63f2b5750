"""Step time of routed against standard training of the same model, and the share of it that waits for data."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import RoutingConfig, RoutingPlan
from skvr_dist.train.batches import WatchedBatches
from skvr_dist.train.mfu import UtilisationMeter
from skvr_dist.train.plans import plan_of_step


@dataclass(frozen=True)
class StepTimes:
    """Seconds of the steps of one kind, in the order they ran."""

    name: str
    seconds: list[float]
    skipped_kv_share: float
    """Mean share of key/value projections that were not computed."""
    utilisation: list[dict[str, float]]
    """What a run would report of each of these steps (`skvr_dist.train.mfu`)."""

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """Seconds of the fastest step: the one that neighbours on the machine disturbed least."""
        return min(self.seconds)

    @property
    def mfu(self) -> float | None:
        """Median MFU by the causal count; None on CPUs, NaN where the GPU's peak is not known."""
        found = [each["train/mfu"] for each in self.utilisation if "train/mfu" in each]
        return statistics.median(found) if found else None


@dataclass(frozen=True)
class Ratio:
    """Time of one kind of step over that of another: the median of the ratios of neighbouring steps, and quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, one: StepTimes, other: StepTimes) -> Ratio:
        """Time of steps of one kind over that of another's, pair by pair."""
        return cls.between([a / b for a, b in zip(one.seconds, other.seconds, strict=True)])

    @classmethod
    def between(cls, ratios: Sequence[float]) -> Ratio:
        """Median and quartiles of ratios of pairs."""
        lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True)
class Kind:
    """Steps that are timed beside others."""

    name: str
    step: Callable[[Iterator[MicroBatch], RoutingPlan], object]
    """Runs an optimizer step on that plan, which it may know nothing of."""
    routing: RoutingConfig
    """What the plans of its steps are drawn by."""


def interleaved_step_times(
    config: Config, mesh: Mesh, kinds: Sequence[Kind], rounds: int, teacher: ModelConfig | None = None
) -> list[StepTimes]:
    """Time optimizer steps of several kinds in turn, so that a noisy neighbour meets all of them.

    Every round runs one step of each kind, in an order that turns with the round; the first round warms up and is not
    counted. Tokens are random: only the time matters. Collective over all ranks.

    Args:
        teacher: the frozen one that steps run too, whose operations count.
    """
    batches = WatchedBatches(random_batches(config), logging.getLogger("skvr_dist"))
    meter = UtilisationMeter(config, mesh, teacher)
    seconds: list[list[float]] = [[] for _ in kinds]
    skipped: list[list[float]] = [[] for _ in kinds]
    utilisation: list[list[dict[str, float]]] = [[] for _ in kinds]
    for number in range(rounds + 1):
        for offset in range(len(kinds)):
            kind = (number + offset) % len(kinds)
            plan = plan_of_step(config, number, kinds[kind].routing)
            mesh.host_group.sum([0.0])  # all ranks start together
            started, pairs_before = time.perf_counter(), batches.document_pairs
            kinds[kind].step(batches, plan)
            if mesh.devices.device_type == "cuda":
                torch.cuda.synchronize()  # the optimizer's kernels, which nobody waits for in a step
            if number > 0:
                seconds[kind].append(time.perf_counter() - started)
                skipped[kind].append(plan.skipped_kv_share)
                pairs = (batches.document_pairs - pairs_before) * mesh.dp_size
                utilisation[kind].append(meter.values(1, plan, seconds[kind][-1], pairs))
    return [
        StepTimes(kind.name, times, statistics.mean(shares), values)
        for kind, times, shares, values in zip(kinds, seconds, skipped, utilisation, strict=True)
    ]


def data_wait_share(config: Config, engine: RoutedPipelineEngine, batches: WatchedBatches, steps: int) -> float:
    """Share of the time of `steps` optimizer steps that goes into waiting for micro-batches; one more warms up."""
    waited = seconds = 0.0
    for step in range(steps + 1):
        plan = plan_of_step(config, step)
        started, waited_before = time.perf_counter(), batches.seconds
        engine.train_step(batches, plan)
        if step:
            waited += batches.seconds - waited_before
            seconds += time.perf_counter() - started
    return waited / seconds


def random_batches(config: Config) -> Iterator[MicroBatch]:
    """Micro-batches of random tokens, without end; separate documents are some `model.vocab_size` tokens long."""
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = (config.train.micro_batch_size, config.data.sequence_length + 1)
    separate_at = 0 if config.data.documents == "separate" else None
    while True:
        yield MicroBatch.of(torch.randint(0, config.model.vocab_size, shape, generator=generator), separate_at)
