"""Which layers each pipeline stage holds."""

from __future__ import annotations

import itertools

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.model.operations import Widths, head_operations, layer_operations

Bounds = tuple[int, int]
"""First layer of a stage, and the first layer after it."""


def stage_bounds(model: ModelConfig, parallel: ParallelConfig, sequence_length: int) -> list[Bounds]:
    """Layers of every stage: `parallel.stage_layers` by hand, or the split with the least costly worst stage."""
    counts = parallel.stage_layers or _balanced(model, parallel.pipeline, sequence_length)
    return list(itertools.pairwise(itertools.accumulate(counts, initial=0)))


def layer_and_head_operations(model: ModelConfig, sequence_length: int) -> tuple[int, int]:
    """Operations on a sequence of one layer, and of the output head; the embedding is a look-up and costs none.

    Of attention those of causal pairs, half of all, as if the sequence were one document.
    """
    widths = Widths.of(model)
    layer = layer_operations(widths, sequence_length, sequence_length)
    matrices = sum(layer.projections.values()) + sum(layer.kv.values())
    return matrices + layer.scores // 2, head_operations(widths, sequence_length)


def _balanced(model: ModelConfig, stages: int, sequence_length: int) -> list[int]:
    """Layers per stage: all stages but the last are equal to within one layer, the last also carries the head.

    Tries every size of the last stage; the others share the rest equally, which is optimal for equal layers.
    """
    layers = model.num_hidden_layers
    if stages == 1:
        return [layers]
    per_layer, head = layer_and_head_operations(model, sequence_length)

    def dearest(last: int) -> int:
        return max(-(-(layers - last) // (stages - 1)) * per_layer, last * per_layer + head)

    last = min(range(1, layers - stages + 2), key=dearest)
    each, extra = divmod(layers - last, stages - 1)
    return [each + (stage < extra) for stage in range(stages - 1)] + [last]
