"""Which layouts are possible; everything else is refused before a process group exists, with the alternatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.config.deepspeed import offload_device
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.config.tree import Config

ZERO_STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")


def why_not(zero_stage: int, pipeline: bool, precision: str) -> str | None:
    """Why that combination is refused, with the way out; None where it is supported.

    Tensor, sequence and data parallelism and activation checkpointing go with every supported one.
    """
    if zero_stage == 2 and pipeline:
        return (
            "parallel.zero_stage 2 under a pipeline: gradients would be reduced for every micro-batch to save memory "
            "that only stage 3 saves for good; use zero_stage 1 or 3, or parallel.pipeline 1"
        )
    if zero_stage == 0 and precision == "bf16":
        return (
            "train.precision bf16 with parallel.zero_stage 0: DeepSpeed then accumulates gradients in bf16; "
            "use zero_stage 1, 2 or 3 (fp32 gradients and master weights) or precision fp32"
        )
    return None


def zero_stage_in_use(config: Config, replicas: int) -> int:
    """The stage of ZeRO that a run trains with: `parallel.zero_stage` where there is anything to share out.

    One replica in fp32 holds everything anyway. Stages 1 and 2 would train a flat copy of its weights, and copy every
    gradient and every weight twice a step (docs/benchmarks/2026-11-26-cpu-step.md).
    """
    stage, is_fp32 = config.parallel.zero_stage, config.train.precision == "fp32"
    alone = replicas == 1 and is_fp32 and offload_device(config.deepspeed) == "none"
    return 0 if alone and stage < 3 else stage


def support_matrix() -> str:
    """The supported combinations, as a table."""
    columns = [(pipeline, precision) for pipeline in (False, True) for precision in PRECISIONS]
    refusals = {stage: [why_not(stage, *column) for column in columns] for stage in ZERO_STAGES}
    rows = [[stage, *("no" if reason else "yes" for reason in refusals[stage])] for stage in ZERO_STAGES]
    header = ["ZeRO", *(f"{'pipeline' if pipeline else 'no pipeline'}, {precision}" for pipeline, precision in columns)]
    reasons = dict.fromkeys(reason for stage in ZERO_STAGES for reason in refusals[stage] if reason)
    return "\n\n".join([tabulate(rows, headers=header, tablefmt="github"), *(f"* {reason}." for reason in reasons)])


def require_possible(parallel: ParallelConfig, model: ModelConfig, sequence_length: int, precision: str) -> None:
    """Check that a layout fits the model.

    Raises:
        ValueError: they do not fit, with both numbers and the way out.
    """
    reason = why_not(parallel.zero_stage, parallel.pipeline > 1, precision)
    if reason is not None:
        raise ValueError(reason)
    _require_stages(parallel, model)
    _require_shards(parallel, model, sequence_length)


def _require_stages(parallel: ParallelConfig, model: ModelConfig) -> None:
    layers, stages, split = model.num_hidden_layers, parallel.pipeline, parallel.stage_layers
    if stages > layers:
        raise ValueError(
            f"parallel.pipeline is {stages}, but model.num_hidden_layers is {layers}: every stage needs a layer; "
            f"use at most {layers} stages"
        )
    if split is not None and (len(split) != stages or sum(split) != layers or min(split) < 1):
        raise ValueError(
            f"parallel.stage_layers {split} must be {stages} positive counts (parallel.pipeline) that add up to "
            f"{layers} (model.num_hidden_layers)"
        )


def _require_shards(parallel: ParallelConfig, model: ModelConfig, sequence_length: int) -> None:
    ranks, kv_heads = parallel.tensor, model.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size", "hidden_size"):
        size = getattr(model, name)
        if size % ranks:
            raise ValueError(
                f"model.{name} {size} cannot be split over parallel.tensor {ranks} ranks; use a divisor of {size}"
            )
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"model.num_key_value_heads {kv_heads} and parallel.tensor {ranks}: one must be a multiple of the other, "
            f"so that each rank holds whole heads or a copy of one"
        )
    if model.vocab_size <= (ranks - 1) * -(-model.vocab_size // ranks):
        raise ValueError(
            f"model.vocab_size {model.vocab_size} leaves the last of parallel.tensor {ranks} ranks without a token; "
            f"use fewer ranks"
        )
    if not parallel.sequence_parallel:
        return
    if ranks == 1:
        raise ValueError(
            "parallel.sequence_parallel needs parallel.tensor of at least 2, got 1; raise it or turn it off"
        )
    if sequence_length % ranks:
        raise ValueError(
            f"parallel.sequence_parallel cannot split data.sequence_length {sequence_length} over parallel.tensor "
            f"{ranks} ranks; use a multiple of {ranks}"
        )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Replicas that `world_size` ranks make.

    Raises:
        UserError: the world size does not fit the layout, or the batch does not divide over the replicas.
    """
    stages, tensors = config.parallel.pipeline, config.parallel.tensor
    if world_size % (stages * tensors):
        raise UserError(
            f"{world_size} ranks cannot hold parallel.pipeline {stages} stages x parallel.tensor {tensors} ranks; "
            f"start a multiple of {stages * tensors} ranks"
        )
    replicas = world_size // (stages * tensors)
    if config.num_micro_batches % replicas:
        micro = config.train.micro_batch_size
        raise UserError(
            f"train.global_batch_size {config.train.global_batch_size} with micro_batch_size {micro} makes "
            f"{config.num_micro_batches} micro-batches, which {replicas} replicas cannot share equally; "
            f"make the batch a multiple of {micro * replicas}"
        )
    if config.num_distilled % replicas:
        share = replicas * max(round(config.num_distilled / replicas), 1) / config.num_micro_batches
        raise UserError(
            f"distillation.share makes {config.num_distilled} of {config.num_micro_batches} micro-batches distilled, "
            f"which {replicas} replicas cannot share equally; give one that makes a multiple of {replicas}, such as "
            f"{share:g}"
        )
    if config.data.lanes % (config.train.micro_batch_size * replicas):
        raise UserError(
            f"data.lanes {config.data.lanes} must be a multiple of train.micro_batch_size x replicas = "
            f"{config.train.micro_batch_size} x {replicas}, so that each replica reads lanes of its own"
        )
    return replicas
