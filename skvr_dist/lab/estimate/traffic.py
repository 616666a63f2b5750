"""The bytes that a rank puts into every kind of operation in a step, exactly.

As `skvr_dist.lab.virtual.record` counts them: of a gather this rank's part, of a reduce-scatter all parts. The few
numbers that all ranks agree on in a step (gradient norm, sums of the loss, flags), and the plan, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from skvr_dist.lab.estimate.rank import MicroBatch, RankSizes, Weight

Traffic = dict[tuple[str, str], int]
"""Bytes by (link, operation): links are `forwards` and `backwards` between stages, `tensor`, `replicas`, `tied`."""

_PERSISTENT = 100_000  # DeepSpeed's stage3_param_persistence_threshold
_REUSE = 10**9  # its stage3_max_reuse_distance, in elements


@dataclass
class _Sum:
    bytes: Traffic = field(default_factory=dict)

    def add(self, link: str, operation: str, size: int) -> None:
        if size:
            self.bytes[link, operation] = self.bytes.get((link, operation), 0) + size


def step_traffic(rank: RankSizes, rows: Sequence[MicroBatch]) -> Traffic:
    """Bytes of one step.

    Args:
        rows: the step's micro-batches of this rank's replica.
    """
    total = _Sum()
    for row in rows:
        _add_messages(total, rank, row)
        if rank.tensor > 1:
            _add_tensor_parallel(total, rank, row)
    if rank.tensor > 1:
        total.add("tensor", "all_reduce", 4 * _partial_elements(rank))
    if rank.replicas > 1:
        _add_replicas(total, rank)
    if rank.model.tie_word_embeddings and rank.stages > 1 and (rank.is_first or rank.is_last):
        _add_tied(total, rank)
    return total.bytes


def _add_messages(total: _Sum, rank: RankSizes, row: MicroBatch) -> None:
    entering = rank.element * rank.packed_elements(row.entering)
    leaving = rank.element * rank.packed_elements(row.leaving)
    part = rank.element * rank.tokens * rank.model.hidden_size // rank.tensor
    if not rank.is_first:
        total.add("forwards", "receive", entering)
        total.add("backwards", "send", entering)
    if not rank.is_last:
        total.add("forwards", "send", leaving)
        total.add("backwards", "receive", leaving)
    if rank.hidden_is_split_for_sending:
        total.add("tensor", "all_gather", part * ((not rank.is_first) + (not rank.is_last)))


def _add_tensor_parallel(total: _Sum, rank: RankSizes, row: MicroBatch) -> None:
    model, size = rank.model, rank.element
    hidden = size * rank.tokens * model.hidden_size
    split = rank.config.parallel.sequence_parallel
    checkpointing = rank.config.parallel.activation_checkpointing
    # Of hidden states: how often they enter a region between norms and leave one, forwards and again backwards; and how
    # often those split by position are gathered for linear layers.
    leaves = gradients_of_enters = gradients_of_leaves = gathered = 0
    for layer in rank.layers:
        again = checkpointing.covers("layer", layer)
        leaves += 2 + again  # torch stops to compute again before the last sum, of which nothing is kept
        gradients_of_enters += 2
        gradients_of_leaves += 2
        gathered += 2 * (2 + again)  # the backward pass needs them once more
        if checkpointing.covers("attention", layer):  # queries are computed apart, and again
            gathered += 1 + 2 * split * (layer in row.read)
            gradients_of_enters += split * (layer in row.read)
        if layer in row.read and rank.kv_copies > 1:
            copied = 2 * rank.kv * (model.hidden_size + model.attention_bias)
            total.add("tensor", "all_reduce", size * copied)
    if rank.is_first:
        leaves, gradients_of_leaves = leaves + 1, gradients_of_leaves + 1
    if rank.is_last:
        gathered, gradients_of_enters = gathered + 1, gradients_of_enters + 1
        total.add("tensor", "all_gather", 8 * rank.tokens)  # two figures of each token's loss
    if split:
        total.add("tensor", "all_gather", hidden // rank.tensor * (gathered + gradients_of_leaves))
        total.add("tensor", "reduce_scatter", hidden * (leaves + gradients_of_enters))
    else:
        total.add("tensor", "all_reduce", hidden * (leaves + gradients_of_enters))


def _partial_elements(rank: RankSizes) -> int:
    """Elements of gradients that a rank of the first replica sums over the tensor-parallel ranks in a step."""
    partial = [weight.elements for weight in rank.weights if weight.partial]
    if rank.zero_stage == 3:
        return sum(-(-each // rank.replicas) for each in partial)
    if rank.zero_stage == 2 or (rank.zero_stage == 1 and rank.element == 4):  # its share of them, as they lie
        vectors = [weight for weight in rank.weights if not weight.is_matrix]
        share, ends = flat_shares(rank)[1], list(accumulate(weight.elements for weight in vectors))
        placed = zip(vectors, ends, strict=True)
        return sum(max(w.elements - max(end - share, 0), 0) for w, end in placed if w.partial)
    return sum(partial)


def _add_replicas(total: _Sum, rank: RankSizes) -> None:
    stage, reductions = rank.zero_stage, 4 * rank.parameters
    if stage == 3:
        padded = sum(-(-weight.elements // rank.replicas) * rank.replicas for weight in rank.weights)
        total.add("replicas", "reduce_scatter", 4 * padded * rank.micro_batches)
        total.add("replicas", "all_gather", gathered_bytes(rank))
        return
    total.add("replicas", "all_reduce", reductions * (rank.micro_batches if stage == 2 else 1))
    if stage > 0:
        total.add("replicas", "all_gather", rank.element * sum(flat_shares(rank)))


def flat_shares(rank: RankSizes) -> list[int]:
    """Elements of this rank's share of each of ZeRO-1's flat groups: matrices, and norms with biases."""
    parts = 2 * rank.replicas if rank.zero_stage else 1  # DeepSpeed's alignment for NCCL
    sums = [sum(w.elements for w in rank.weights if w.is_matrix is matrices) for matrices in (True, False)]
    return [-(-each // parts) * parts // max(rank.replicas, 1) for each in sums]


def is_persistent(rank: RankSizes, weight: Weight) -> bool:
    """Whether ZeRO-3 keeps the whole weight on every rank."""
    return weight.elements <= rank.zero_option("stage3_param_persistence_threshold", _PERSISTENT)


def released_modules(rank: RankSizes) -> set[str]:
    """Modules whose weights ZeRO-3 gives up after the forward pass and fetches again for the backward pass.

    It keeps those that are used again within `stage3_max_reuse_distance` elements of other weights.
    """
    if rank.in_flight > 1:  # forward and backward passes of several micro-batches alternate: no order to go by
        return {weight.module for weight in rank.weights}
    limit = rank.zero_option("stage3_max_reuse_distance", _REUSE)
    released, later = set(), 0
    for module in reversed(list(dict.fromkeys(weight.module for weight in rank.weights))):
        if 2 * later >= limit:
            released.add(module)
        later += sum(weight.elements for weight in rank.weights if weight.module == module)
    return released


def gathered_bytes(rank: RankSizes) -> int:
    """Bytes of its partitions that a rank puts into ZeRO-3's gathers in a step."""
    released, elements = released_modules(rank), 0
    for weight in rank.weights:
        share = -(-weight.elements // rank.replicas)
        times = 1 if is_persistent(rank, weight) else rank.micro_batches * (1 + (weight.module in released))
        elements += share * times
    return rank.element * elements


def _add_tied(total: _Sum, rank: RankSizes) -> None:
    table = next(weight for weight in rank.weights if weight.module == "embedding")
    held, copied = table.elements, table.elements
    if rank.zero_stage == 3:
        held = -(-table.elements // rank.replicas)
        copied = held + table.elements * is_persistent(rank, table)
    total.add("tied", "all_reduce", 4 * held)
    total.add("tied", "broadcast", rank.element * copied)
