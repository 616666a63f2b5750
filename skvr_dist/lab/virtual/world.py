"""Which ranks of a world are worth tracing, of a model that is as small as its layout allows, and what they say."""

from __future__ import annotations

from collections.abc import Iterator

from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.ranks import run_alone
from skvr_dist.lab.virtual.rank import Trace, trace_rank


def distinct_ranks(config: Config, world_size: int) -> list[int]:
    """The ranks that stand for all: two whole pipelines, of the first and the last replica, and of the last
    tensor-parallel rank the first, middle and last stage.

    Every group that differs in kind then has two of its members among them, and every message both of its ends.
    """
    pp_size, tp_size = config.parallel.pipeline, config.parallel.tensor
    dp_size = data_parallel_size(config, world_size)

    def rank(stage: int, replica: int, tensor: int) -> int:
        return (stage * dp_size + replica) * tp_size + tensor

    pipelines = {rank(stage, replica, 0) for stage in range(pp_size) for replica in (0, dp_size - 1)}
    ends = {rank(stage, 0, tp_size - 1) for stage in (0, pp_size // 2, pp_size - 1)}
    return sorted(pipelines | ends)


def shrunk(config: Config) -> Config:
    """The same layers, heads, layout, routing and micro-batches, at sizes that take no time.

    What is asked of whom, and in which order, depends on none of these sizes.
    """
    heads, tp_size = config.model.num_attention_heads, config.parallel.tensor
    model = config.model.model_copy(
        update={
            "head_dim": 4,
            "hidden_size": 4 * heads,
            "intermediate_size": 4 * tp_size,
            "vocab_size": 4 * tp_size,
            "max_position_embeddings": 4 * tp_size,
        }
    )
    data = config.data.model_copy(update={"sequence_length": 4 * tp_size})
    # Where sequences have donors each, their number decides what is read.
    each = config.train.micro_batch_size if config.routing.draws_per == "sequence" else 1
    batch = {"micro_batch_size": each, "global_batch_size": each * config.num_micro_batches}
    train = config.train.model_copy(update=batch)
    return config.model_copy(update={"model": model, "data": data, "train": train})


def trace_world(config: Config, world_size: int, steps: int) -> Iterator[Trace]:
    """The trace of each of `distinct_ranks`, every one from a process of its own, one after the other.

    Raises:
        UserError: there is a frozen teacher, which is of a size of its own.
    """
    if config.distillation and not config.distillation.is_own:
        raise UserError(
            f"distillation.teacher {config.distillation.teacher} cannot be tried on made-up ranks, whose model is as "
            f"small as can be; set distillation.teacher to self, or distillation to null"
        )
    small = shrunk(config)
    for rank in distinct_ranks(config, world_size):
        yield run_alone(trace_rank, small, rank, world_size, steps)
