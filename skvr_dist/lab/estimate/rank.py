"""The sizes of one rank: its weights, its share of the tokens, its micro-batches and what the plan makes of them.

Shapes: B batch, S sequence, D hidden, I intermediate, H heads, K key/value heads, E head_dim, V vocabulary,
T tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from skvr_dist.config.layouts import data_parallel_size, zero_stage_in_use
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.model.operations import Widths
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.routing import KVPart, RoutingPlan, crossing_parts, read_layers


@dataclass(frozen=True)
class Weight:
    """One weight of a rank, before ZeRO shares it out."""

    module: str
    """`embedding`, `layer N`, `norm` or `head`: what ZeRO-3 fetches as one."""
    elements: int
    is_matrix: bool
    partial: bool = False
    """Whether tensor-parallel ranks sum its gradient at the end of a step (`skvr_dist.model.modules.TensorShard`)."""


@dataclass(frozen=True)
class RankSizes:
    """A rank, by its stage: its tensor-parallel and data-parallel neighbours hold as much.

    Args:
        config: the run's.
        gpus: ranks of the run.
        stage: the rank's pipeline stage.
    """

    config: Config
    gpus: int
    stage: int

    @cached_property
    def model(self) -> ModelConfig:
        """The decoder's shape."""
        return self.config.model

    @cached_property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return data_parallel_size(self.config, self.gpus)

    @cached_property
    def zero_stage(self) -> int:
        """The stage of ZeRO that is in use."""
        return zero_stage_in_use(self.config, self.replicas)

    @cached_property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline

    @cached_property
    def tensor(self) -> int:
        """T."""
        return self.config.parallel.tensor

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """The stage's first layer, and the first one after it."""
        return stage_bounds(self.model, self.config.parallel, self.config.data.sequence_length)[self.stage]

    @cached_property
    def layers(self) -> range:
        """The stage's layers."""
        return range(*self.bounds)

    @property
    def is_first(self) -> bool:
        """Whether the stage holds the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds the head and the loss."""
        return self.stage == self.stages - 1

    @cached_property
    def micro_batches(self) -> int:
        """Of one step on this rank."""
        return self.config.num_micro_batches // self.replicas

    @cached_property
    def in_flight(self) -> int:
        """Micro-batches whose activations 1F1B keeps at once on this stage."""
        return min(self.stages - self.stage, self.micro_batches)

    @cached_property
    def element(self) -> int:
        """Bytes of an element of weights and activations."""
        return 2 if self.config.train.precision == "bf16" else 4

    @cached_property
    def tokens(self) -> int:
        """B x S: of one micro-batch."""
        return self.config.train.micro_batch_size * self.config.data.sequence_length

    @cached_property
    def split_tokens(self) -> int:
        """Tokens whose hidden states between regions this rank holds."""
        return self.tokens // (self.tensor if self.config.parallel.sequence_parallel else 1)

    @cached_property
    def queries(self) -> int:
        """Elements of this rank's queries for one token."""
        return self.model.num_attention_heads * self.model.head_dim // self.tensor

    @cached_property
    def kv(self) -> int:
        """Elements of this rank's keys (or values) of one layer for one token."""
        return max(self.model.num_key_value_heads // self.tensor, 1) * self.model.head_dim

    @cached_property
    def inner(self) -> int:
        """This rank's elements inside the MLP for one token."""
        return self.model.intermediate_size // self.tensor

    @cached_property
    def vocabulary(self) -> int:
        """Rows of this rank's vocabulary matrices; its logits of one token."""
        return -(-self.model.vocab_size // self.tensor)

    @cached_property
    def widths(self) -> Widths:
        """Sizes of this rank's matrices."""
        return Widths(self.model.hidden_size, self.queries, self.kv, self.inner, self.vocabulary)

    @property
    def kv_copies(self) -> int:
        """Tensor-parallel ranks that hold the same key/value head."""
        return max(self.tensor // self.model.num_key_value_heads, 1)

    @property
    def hidden_is_split_for_sending(self) -> bool:
        """Whether 1/T of the hidden states is sent, and gathered behind the boundary."""
        return self.tensor > 1 and not self.config.parallel.sequence_parallel

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """All weights of the rank, in the decoder's order."""
        hidden, tied = self.model.hidden_size, self.model.tie_word_embeddings
        table = self.vocabulary * hidden
        found = [Weight("embedding", table, True)] if self.is_first or (self.is_last and tied) else []
        for layer in self.layers:
            found += [Weight(f"layer {layer}", *each) for each in self._layer_weights()]
        if self.is_last:
            found.append(Weight("norm", hidden, False, self.config.parallel.sequence_parallel))
            if not tied:
                found.append(Weight("head", table, True))
        return tuple(found)

    def _layer_weights(self) -> list[tuple[int, bool, bool]]:
        model, hidden, split = self.model, self.model.hidden_size, self.config.parallel.sequence_parallel
        norm = [(hidden, False, split)]
        found = list(norm)
        for outputs in (self.queries, self.kv, self.kv):
            found += [(hidden * outputs, True, False), *[(outputs, False, False)] * model.attention_bias]
        found += [(hidden * self.queries, True, False), *[(hidden, False, split)] * model.attention_output_bias]
        found += [(model.head_dim, False, True)] * (2 * model.qk_norm)
        return found + norm + [(hidden * self.inner, True, False)] * 3

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(weight.elements for weight in self.weights)

    def zero_option(self, name: str, default: int) -> int:
        """A size of DeepSpeed's ZeRO section, or DeepSpeed's default."""
        options: dict[str, Any] = self.config.deepspeed.get("zero_optimization", {})
        return int(options.get(name, default))

    def rows(self, plan: RoutingPlan, replica: int = 0) -> list[MicroBatch]:
        """What a step's plan asks of this stage, for each micro-batch of a replica."""
        start, stop = self.bounds
        return [
            MicroBatch(
                donors=donors,
                read=_read(donors),
                entering=len(_crossing(donors, start)) / len(donors) if start else 0.0,
                leaving=len(_crossing(donors, stop)) / len(donors),
                kept=_read_by_others(donors) | {layer for layer, _ in _crossing(donors, stop)},
                left=frozenset(layer for layer, _ in _crossing(donors, stop) if layer in self.layers),
                slots=self._slots(donors),
            )
            for donors in map(plan.of_micro_batch, range(replica, plan.num_micro_batches, self.replicas))
        ]

    def _slots(self, donors: Rows) -> int:
        """Slots of a micro-batch's arena here: layers of the stage that it reads, and the most that a row gets."""
        read = [{row[layer] for layer in self.layers} for row in donors]
        own = {donor for row in read for donor in row if donor in self.layers}
        return len(own) + max(sum(donor < self.layers.start for donor in row) for row in read)

    def packed_elements(self, crossing: float) -> int:
        """Elements of what this rank sends over a boundary for one micro-batch.

        Args:
            crossing: layers whose keys and values cross, on average over the rows of donors.
        """
        hidden = self.tokens * self.model.hidden_size // self.tensor
        return hidden + 2 * round(crossing * self.tokens) * self.kv


Rows = tuple[tuple[int, ...], ...]
"""The rows of donors of a micro-batch, [R][L]."""


# Proposals ask the same of the same plans for hundreds of layouts.
@lru_cache(maxsize=1 << 14)
def _read(donors: Rows) -> frozenset[int]:
    return frozenset(read_layers(np.array(donors)).nonzero()[0].tolist())


@lru_cache(maxsize=1 << 14)
def _read_by_others(donors: Rows) -> frozenset[int]:
    return frozenset(donor for row in donors for reader, donor in enumerate(row) if reader != donor)


@lru_cache(maxsize=1 << 18)
def _crossing(donors: Rows, boundary: int) -> tuple[KVPart, ...]:
    return crossing_parts(donors, boundary)


@dataclass(frozen=True)
class MicroBatch:
    """The routing of one micro-batch, as a stage sees it."""

    donors: Rows
    read: frozenset[int]
    """Layers whose keys and values anyone reads."""
    entering: float
    """How many layers' keys and values come from the stage before, on average over the rows."""
    leaving: float
    """How many layers' keys and values go to the stage after, likewise."""
    kept: frozenset[int]
    """Layers whose keys and values another layer reads, here or on a later stage."""
    left: frozenset[int]
    """Layers of this stage whose keys and values go to the stage after."""
    slots: int
    """Of the arena that attention reads from here, if it does (`skvr_dist.model.arena`)."""
