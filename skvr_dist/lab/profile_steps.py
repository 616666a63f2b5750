"""A trace of a run's training steps on each rank, for Perfetto or chrome://tracing, and the seconds of their parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.files import PARTIAL_SUFFIX, naming_failure
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.plans import plan_of_step


@dataclass(frozen=True)
class RankProfile:
    """What one rank took, on average over the traced steps, with the profiler at work."""

    rank: int
    stage: int
    step_seconds: float
    parts: dict[str, float]
    """Seconds by part (`skvr_dist.parallel.engine.stopwatch.PARTS`)."""
    file: str
    """Where its trace is."""


def profile_steps(
    config: Config,
    engine: RoutedPipelineEngine,
    mesh: Mesh,
    batches: Iterator[MicroBatch],
    *,
    warmup: int,
    steps: int,
    folder: Path,
) -> list[RankProfile]:
    """Train, and trace the last steps; collective over all ranks.

    A step is named `step N`, and within it what the rank does for each micro-batch after the instructions of the
    pipeline: `ForwardPass 0`, `RecvGrad 3`, `OptimizerStep`.

    Args:
        batches: the run's, on this replica.
        warmup: steps before them, which load code and reserve memory.
        folder: each rank writes its `rank-00000.json.gz` there.

    Returns:
        what each rank took, by rank.

    Raises:
        UserError: a trace cannot be written.
    """
    for step in range(warmup):
        engine.train_step(batches, plan_of_step(config, step))
    on_gpu = mesh.devices.device_type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    parts: dict[str, float] = {}
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for step in range(warmup, warmup + steps):
            with record_function(f"step {step + 1}"):
                engine.train_step(batches, plan_of_step(config, step))
            engine.stopwatch.read()
            parts = {part: parts.get(part, 0.0) + seconds for part, seconds in engine.stopwatch.parts.items()}
        seconds = time.perf_counter() - started
    file = folder / f"rank-{mesh.rank:05d}.json.gz"
    with naming_failure(file):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"rank-{mesh.rank:05d}{PARTIAL_SUFFIX}.json.gz"
        profiler.export_chrome_trace(str(partial))
        partial.replace(file)
    means = {part: total / steps for part, total in parts.items()}
    return mesh.host_group.gather(RankProfile(mesh.rank, mesh.pp_rank, seconds / steps, means, str(file)))
