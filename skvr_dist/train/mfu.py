"""Model FLOPs utilisation (MFU): the operations that a step's mathematics needs, over what the GPUs could have done.

    MFU = operations of the step / (seconds of the step x sum of the peaks of all ranks' GPUs)

Operations are those of `skvr_dist.model.operations`, forwards once and backwards twice, by what the routing plan asks
for: projections to keys and values that nobody reads are skipped, so they do not count. What is computed twice
(activation checkpointing) counts once. The causal count takes half of attention's scores, the full one all of them, as
some publications do; where documents are separate, both take those within documents. Everything is known on the host:
no device is asked, and none is waited for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.model.operations import Widths, head_operations, layer_operations
from skvr_dist.model.trained import is_trained
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.passes import ONCE, StepPasses
from skvr_dist.routing import RoutingPlan, read_layers
from skvr_dist.train.passes import passes_of_step

BF16_PEAKS = {
    "H200 NVL": 835.5,
    "H200": 989.0,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100 80GB HBM3": 989.0,
    "A100": 312.0,
}
"""Peak of dense bf16 matrix products by what the driver's name of a GPU contains, in 1e12 operations per second.

Half of what NVIDIA's data sheets print with sparsity: H100 Tensor Core GPU (SXM 1,979, PCIe 1,513, NVL 1,671), H200
Tensor Core GPU (SXM 1,979, NVL 1,671), A100 Tensor Core GPU (SXM and PCIe alike, 624). SXM cards of the H100 are called
"NVIDIA H100 80GB HBM3"."""


def peak_tflops(device: str, precision: str) -> float | None:
    """The peak of a GPU in 1e12 operations per second; None if it is not known here.

    Args:
        device: the driver's name of it.
        precision: of the run; the peak of fp32 depends on whether TF32 is allowed, and is not known here.
    """
    if precision != "bf16" or "MIG" in device:  # a slice of a GPU has its name
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


def peak_of_ranks(mesh: Mesh, precision: str) -> float | None:
    """Sum of the peaks of all ranks' GPUs in 1e12 operations per second; collective.

    Returns:
        NaN if that of any of them is not known; None on CPUs.
    """
    if mesh.devices.device_type != "cuda":
        return None
    mine = peak_tflops(torch.cuda.get_device_name(), precision)
    (total,) = mesh.host_group.sum([math.nan if mine is None else mine])
    return total


@dataclass(frozen=True)
class _PassOperations:
    """Of one pass of a micro-batch, each [forwards alone, both ways]."""

    fixed: tuple[int, int]
    """Of all matrices but those of keys and values."""
    kv: tuple[int, int]
    """Of one layer's projections to keys and values."""
    scores: tuple[int, int]
    """Of attention in all layers, between every two positions."""

    @classmethod
    def of(cls, config: Config, model: ModelConfig) -> _PassOperations:
        """Those of a model on a micro-batch of a run."""
        tokens, only = config.train.micro_batch_size * config.data.sequence_length, config.train.only
        widths, layers = Widths.of(model), model.num_hidden_layers
        layer, head = layer_operations(widths, tokens, config.data.sequence_length), head_operations(widths, tokens)
        head_module = "embed_tokens" if model.tie_word_embeddings else "lm_head"

        def ways(module: str) -> int:  # frozen weights have no gradients, but pass those of their inputs on
            return 3 if is_trained(f"{module}.weight", only) else 2

        def both_ways(of_modules: dict[str, int]) -> int:
            return sum(count * ways(name) for name, count in of_modules.items())

        return cls(
            fixed=(
                layers * sum(layer.projections.values()) + head,
                layers * both_ways(layer.projections) + head * ways(head_module),
            ),
            kv=(sum(layer.kv.values()), both_ways(layer.kv)),
            scores=(layers * layer.scores, 3 * layers * layer.scores),
        )


class StepOperations:
    """Counts the operations of a run's steps, over all ranks.

    Args:
        teacher: the shape of the frozen model that it is distilled from, if any; it has forward passes alone.
    """

    def __init__(self, config: Config, teacher: ModelConfig | None = None) -> None:
        self._own = _PassOperations.of(config, config.model)
        self._teacher = _PassOperations.of(config, teacher) if teacher else self._own
        self._teacher_layers = teacher.num_hidden_layers if teacher else 0

    def of_step(self, plan: RoutingPlan, passes: StepPasses, document_share: float = 1.0) -> tuple[float, float]:
        """Operations of a step.

        Args:
            passes: those of each micro-batch.
            document_share: pairs of positions of the same document, over those of the same sequence.

        Returns:
            the causal count, and the full one.
        """
        fixed, scores = 0.0, 0.0
        once = sum(each is ONCE for each in passes)
        if once == len(passes):  # nothing is distilled
            fixed = once * self._own.fixed[1]
            fixed += self._own.kv[1] * (1 - plan.skipped_kv_share) * once * plan.num_layers
            scores = once * self._own.scores[1]
        else:
            for q, runs in enumerate(passes):
                for run in runs:
                    pass_, ways = self._teacher if run.by_teacher else self._own, int(run.runs_back)
                    rows = run.donors or plan.of_micro_batch(q)
                    fixed += pass_.fixed[ways]
                    fixed += pass_.kv[ways] * (self._teacher_layers if run.by_teacher else read_layers(rows).sum())
                    scores += pass_.scores[ways]
        return fixed + scores * document_share / 2, fixed + scores * document_share


class UtilisationMeter:
    """What a run reports of the operations of its steps; making one is collective.

    Args:
        teacher: the shape of the frozen model that it is distilled from, if any.
    """

    def __init__(self, config: Config, mesh: Mesh, teacher: ModelConfig | None = None) -> None:
        self._config, self._ranks = config, mesh.world_size
        self._operations = StepOperations(config, teacher)
        self._peak = peak_of_ranks(mesh, config.train.precision)

    def values(self, step: int, plan: RoutingPlan, seconds: float, document_pairs: float) -> dict[str, float]:
        """Values of a step for the metrics.

        Args:
            step: counted from 1.
            seconds: that it took.
            document_pairs: pairs of positions of its global batch that are in the same document; 0: of all sequences.

        Returns:
            1e12 operations per second and rank (causal); on GPUs MFU by both counts, NaN ("n/a") where a peak is not
            known.
        """
        train, length = self._config.train, self._config.data.sequence_length
        share = document_pairs / (train.global_batch_size * length**2) if document_pairs else 1.0
        operations = self._operations.of_step(plan, passes_of_step(self._config, step - 1), share)
        causal, full = (each / seconds / 1e12 for each in operations)
        values = {"train/model_tflops_per_rank": causal / self._ranks}
        if self._peak is not None:
            values |= {"train/mfu": causal / self._peak, "train/mfu_full_attention": full / self._peak}
        return values
