"""Which layers each pipeline stage holds."""

from __future__ import annotations

import itertools

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig

Bounds = tuple[int, int]
"""First layer of a stage, and the first layer after it."""


def stage_bounds(model: ModelConfig, parallel: ParallelConfig) -> list[Bounds]:
    """Layers of every stage: `parallel.stage_layers` by hand, or the split with the least costly worst stage."""
    counts = parallel.stage_layers or _balanced(model, parallel.pipeline)
    return list(itertools.pairwise(itertools.accumulate(counts, initial=0)))


def layer_cost(model: ModelConfig) -> int:
    """Multiply-adds of one layer per token, without the attention scores (= its matrix parameters)."""
    queries = model.num_attention_heads * model.head_dim
    attention = model.hidden_size * 2 * (queries + model.kv_size)
    return attention + 3 * model.hidden_size * model.intermediate_size


def head_cost(model: ModelConfig) -> int:
    """Multiply-adds of the output head per token; the embedding is a look-up and costs none."""
    return model.hidden_size * model.vocab_size


def _balanced(model: ModelConfig, stages: int) -> list[int]:
    """Layers per stage: all stages but the last are equal to within one layer, the last also carries the head.

    Tries every size of the last stage; the others share the rest equally, which is optimal for equal layers.
    """
    layers, per_layer, head = model.num_hidden_layers, layer_cost(model), head_cost(model)

    if stages == 1:
        return [layers]

    def dearest(last: int) -> int:
        return max(-(-(layers - last) // (stages - 1)) * per_layer, last * per_layer + head)

    last = min(range(1, layers - stages + 2), key=dearest)
    each, extra = divmod(layers - last, stages - 1)
    return [each + (stage < extra) for stage in range(stages - 1)] + [last]
