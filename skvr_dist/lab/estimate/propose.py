"""Ranks the layouts of a model on a number of GPUs by the predicted time of a step, and says why others lose."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from skvr_dist.config.load import validate_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.lab.estimate.layout import GIB, Estimate, estimate
from skvr_dist.lab.estimate.speed import Rates


@dataclass(frozen=True)
class Proposal:
    """A layout in its place."""

    estimate: Estimate
    overrides: str
    """What gives this layout on a command line."""
    why: str
    """Why it is not the first; of the first, that it is."""

    @property
    def gib(self) -> float:
        """Memory of the worst rank."""
        return self.estimate.worst.memory.total / GIB

    def row(self, rates: Rates) -> dict[str, Any]:
        """A row of the table."""
        speed = self.estimate.speed
        return {
            "layout": self.estimate.short,
            "GiB": f"{self.gib:.2f}",
            "fits": self.gib <= rates.memory_gib,
            "step s": round(speed.step_seconds, 3),
            "MFU": f"{speed.mfu:.1%}",
            "bubble": f"{speed.bubble:.1%}",
            "why": self.why,
        }

    def record(self, rates: Rates) -> dict[str, Any]:
        """The row, with what gives this layout on a command line."""
        return self.row(rates) | {"overrides": self.overrides}


def propose(config: Config, gpus: int, rates: Rates) -> list[Proposal]:
    """All layouts, the best first: those that fit by time, then the others by what they miss.

    Tensor-parallel ranks stay within a host, with sequence parallelism where the sequence divides.
    """
    found = [(text, estimate(each, gpus, rates, plans=1)) for text, each in _layouts(config, gpus, rates)]
    if not found:
        raise UserError(
            f"no layout of --gpus {gpus} divides train.global_batch_size {config.train.global_batch_size}; make the "
            f"batch a multiple of {gpus}"
        )

    def place(item: tuple[str, Estimate]) -> tuple[float, float]:
        missing = max(0.0, item[1].worst.memory.total / GIB - rates.memory_gib)
        return missing, item[1].speed.step_seconds

    found.sort(key=place)
    best = found[0][1]
    return [Proposal(each, text, _why(each, best, rates)) for text, each in found]


def require_any(found: Sequence[Proposal], rates: Rates) -> None:
    """Raises `UserError` if nothing fits, with what is missing."""
    least = min(found, key=lambda each: each.gib)
    if least.gib > rates.memory_gib:
        raise UserError(
            f"no layout of --gpus {least.estimate.gpus} fits in {rates.memory_gib:g} GiB: the smallest "
            f"({least.overrides}) needs {least.gib:.1f} GiB, {least.gib - rates.memory_gib:.1f} more; use more GPUs, "
            f"GPUs with more memory or shorter sequences"
        )


def _why(each: Estimate, best: Estimate, rates: Rates) -> str:
    missing = each.worst.memory.total / GIB - rates.memory_gib
    if missing > 0:
        return f"does not fit: {missing:.1f} GiB are missing on stage {each.worst.rank.stage}"
    if each is best:
        return "the fastest that fits"
    behind = each.speed.step_seconds / best.speed.step_seconds - 1
    theirs = best.speed.costs | {"computing": best.speed.computing_seconds}
    mine = each.speed.costs | {"computing": each.speed.computing_seconds}
    name = max(mine, key=lambda cost: mine[cost] - theirs[cost])
    cause = "more is computed, or less evenly" if name == "computing" else name
    return f"{behind:.0%} slower: {cause}"


def _layouts(config: Config, gpus: int, rates: Rates) -> Iterator[tuple[str, Config]]:
    batch = config.train.global_batch_size
    tensors = [n for n in range(1, min(gpus, rates.gpus_per_host) + 1) if gpus % n == 0]
    pipelines = [n for n in range(1, min(gpus, config.model.num_hidden_layers) + 1) if gpus % n == 0]
    choices = itertools.product(tensors, pipelines, (0, 1, 2, 3), (1, 2, 4), ("none", "layer"))
    for tensor, pipeline, zero_stage, micro_batch, recompute in choices:
        if gpus % (tensor * pipeline) or batch % (micro_batch * (gpus // (tensor * pipeline))):
            continue
        replicas = gpus // (tensor * pipeline)
        if replicas == 1 and zero_stage > 1:  # nothing to share
            continue
        split = tensor > 1 and config.data.sequence_length % tensor == 0
        keys: dict[str, Any] = {
            "pipeline": pipeline,
            "tensor": tensor,
            "zero_stage": zero_stage,
            "sequence_parallel": split,
        }
        text = " ".join(f"parallel.{key}={str(value).lower()}" for key, value in keys.items())
        text += f" parallel.activation_checkpointing.recompute={recompute} train.micro_batch_size={micro_batch}"
        raw = config.model_dump()
        raw["parallel"] |= {**keys, "stage_layers": None, "activation_checkpointing": {"recompute": recompute}}
        raw["train"]["micro_batch_size"] = micro_batch
        if config.data.lanes % (micro_batch * replicas):
            raw["data"]["lanes"] = micro_batch * replicas
            text += f" data.lanes={micro_batch * replicas}"
        try:
            yield text, validate_config(raw)
        except UserError:  # the model cannot be split like that
            continue
