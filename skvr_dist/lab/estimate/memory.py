"""The memory of a rank in closed forms: what it always holds, what a micro-batch keeps, and the peak of a step.

Bytes of tensors; what an allocator rounds up or keeps, and what CUDA and NCCL take for themselves, come on top. What a
norm keeps differs: the fused kernel of CUDA its input, the composite one of the CPU its normed input too, in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from skvr_dist.lab.estimate.rank import MicroBatch, RankSizes
from skvr_dist.lab.estimate.traffic import flat_shares, is_persistent, released_modules
from skvr_dist.model.compiled import resolve_compile
from skvr_dist.model.loss import CHUNK_ELEMENTS, chunks, compiled_elements

Kernels = Literal["cpu", "cuda"]

_BUCKET, _PREFETCH = 500_000_000, 50_000_000  # elements of DeepSpeed's reduce_bucket_size and prefetch bucket


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by kind; and when that is."""

    parameters: int
    gradients: int
    optimizer: int
    zero_buffers: int
    """DeepSpeed's buckets, and what ZeRO-3 has gathered."""
    activations: int
    """Of the micro-batches alive, and what the pass that runs takes beside them."""
    pipeline_buffers: int
    loss: int
    """Gradients of hidden states and head, and logits of a chunk."""
    moment: str

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.parameters + self.gradients + self.optimizer + self.zero_buffers + self.activations
            + self.pipeline_buffers + self.loss
        )  # fmt: skip


@dataclass(frozen=True)
class _Activations:
    rank: RankSizes
    kernels: Kernels

    def norm(self, elements: int, rows: int) -> int:
        """What a norm keeps beside its input and its output."""
        inner = 0
        if self.kernels == "cpu":
            inner = elements * (8 if self.rank.element == 2 else 4)
        return inner + 4 * rows

    @property
    def keeps_inputs_of_norms(self) -> bool:
        """Whether a norm keeps its input as it is: the CPU's keeps a copy in float32 (counted in `norm`) of bf16."""
        return self.kernels == "cuda" or self.rank.element == 4

    def _heads(self, elements: int) -> int:
        """Queries or keys after projection, norm and rotation."""
        rank, size = self.rank, self.rank.element * elements
        if not rank.model.qk_norm:
            return size
        rows = elements // rank.model.head_dim
        return size + self.norm(elements, rows) + size * self.keeps_inputs_of_norms

    @property
    def from_arena(self) -> bool:
        """Whether attention reads from an arena; `auto` is taken for a kernel that does not."""
        return self.rank.model.attention == "routed"

    def arena(self, row: MicroBatch) -> int:
        """The keys and values that layers of this stage read, where they lie in an arena, and bounds of documents."""
        slot = 2 * self.rank.element * self.rank.tokens * self.rank.kv
        return (row.slots * slot + 8 * self.rank.tokens) * self.from_arena

    def arena_gradients(self, rows: Sequence[MicroBatch]) -> int:
        """Those of the arena in float32, which is always held for the micro-batch that reads most."""
        return 8 * self.rank.tokens * self.rank.kv * max(row.slots for row in rows) * self.from_arena

    def queries(self, row: MicroBatch) -> int:
        """Queries, what attention keeps of them, and its output; where rows attend on their own, theirs too."""
        rank = self.rank
        elements = rank.tokens * rank.queries
        outputs = rank.element * elements * (1 + (len(row.donors) > 1 and not self.from_arena))
        return self._heads(elements) + outputs + 4 * elements // rank.model.head_dim

    def kv(self, layer: int, row: MicroBatch) -> int:
        """Keys and values that are computed here; beside an arena only if they go to the stage after."""
        elements = self.rank.tokens * self.rank.kv
        size = self.rank.element * elements
        return self._heads(elements) + size - 2 * size * (self.from_arena and layer not in row.left)

    def whole_layer(self, layer: int, row: MicroBatch) -> int:
        """A layer that keeps everything, without its input."""
        rank, size, hidden = self.rank, self.rank.element, self.rank.model.hidden_size
        split = rank.split_tokens * hidden
        norms = 2 * (self.norm(split, rank.split_tokens) + size * split)
        between = size * split * self.keeps_inputs_of_norms
        mlp = 4 * size * rank.tokens * rank.inner
        return norms + between + mlp + self.queries(row) + (self.kv(layer, row) if layer in row.read else 0)

    def layer(self, layer: int, row: MicroBatch) -> int:
        """What a layer keeps until its backward pass, without its input."""
        rank, checkpointing = self.rank, self.rank.config.parallel.activation_checkpointing
        if checkpointing.covers("layer", layer):
            return 2 * rank.element * rank.tokens * rank.kv * (layer in (row.left if self.from_arena else row.kept))
        whole = self.whole_layer(layer, row)
        return whole - self.queries(row) if checkpointing.covers("attention", layer) else whole

    def input_of(self, layer: int) -> int:
        """A layer's hidden states, as far as the layer keeps them."""
        rank, checkpointing = self.rank, self.rank.config.parallel.activation_checkpointing
        if layer == rank.bounds[0] and not rank.is_first:
            return 0  # received, and counted as that
        keeps = self.keeps_inputs_of_norms or checkpointing.covers("layer", layer)
        return keeps * rank.element * rank.split_tokens * rank.model.hidden_size

    def received(self, row: MicroBatch) -> int:
        """What came from the stage before, until its gradient is sent."""
        rank = self.rank
        if rank.is_first:
            return 8 * rank.tokens
        packed = rank.element * rank.packed_elements(row.entering)
        if not rank.hidden_is_split_for_sending:
            return packed
        whole = rank.element * rank.tokens * rank.model.hidden_size
        return whole + packed * bool(row.entering)

    def output(self) -> int:
        """Hidden states for the next stage; on the last one what its norm keeps."""
        rank = self.rank
        split = rank.split_tokens * rank.model.hidden_size
        if not rank.is_last:
            return rank.element * split
        kept = rank.element * split * self.keeps_inputs_of_norms
        return kept + self.norm(split, rank.split_tokens) + rank.element * rank.tokens * rank.model.hidden_size

    def while_running(self, row: MicroBatch, fetched: Mapping[int, int]) -> tuple[int, int]:
        """What a micro-batch holds in its forward pass while the MLP of that layer runs where it is most.

        Args:
            fetched: bytes of whole weights while each layer runs, which count when layers are compared.

        Returns:
            bytes of activations, and of whole weights.
        """
        rank, size = self.rank, self.rank.element
        most, held = (0, 0), self.received(row) + self.tables() + self.arena(row)
        # Of attention its output, the sum with the layer's input, and the norm of that.
        inside = size * 3 * rank.tokens * (rank.model.hidden_size + rank.inner)
        for layer in rank.layers:
            held += self.layer(layer, row) + self.input_of(layer)
            is_computed_again = rank.config.parallel.activation_checkpointing.covers("layer", layer)
            most = max(most, (held + inside * is_computed_again, fetched[layer]), key=sum)
        return most

    def tables(self) -> int:
        """cos and sin of the rotation."""
        return 8 * self.rank.config.data.sequence_length * self.rank.model.head_dim

    def micro_batch(self, row: MicroBatch, stop: int | None = None) -> int:
        """What a micro-batch keeps between its passes, without the loss; up to layer `stop`, without it."""
        layers = [layer for layer in self.rank.layers if stop is None or layer < stop]
        kept = sum(self.layer(layer, row) + self.input_of(layer) for layer in layers)
        kept += self.received(row) + self.tables() + self.arena(row)
        return kept + (self.output() if stop is None else 0)

    def while_running_back(self, row: MicroBatch) -> int:
        """The most that a micro-batch holds in its backward pass, without the loss."""
        rank, size = self.rank, self.rank.element
        checkpointing = rank.config.parallel.activation_checkpointing
        gradient = size * rank.split_tokens * rank.model.hidden_size
        inner = rank.tokens * rank.inner
        mlp = size * (inner + max(inner, rank.model.hidden_size * rank.inner))
        most, held = 0, self.received(row) + self.tables() + self.arena(row) + gradient * rank.is_last
        held += 0 if rank.is_last else self.output()
        for layer in rank.layers:
            held += self.layer(layer, row) + self.input_of(layer)
            again = 0
            if checkpointing.covers("layer", layer):
                again = self.whole_layer(layer, row)
            elif checkpointing.covers("attention", layer):
                again = self.queries(row)
            most = max(most, held + again + mlp)
        return most


def state_bytes(rank: RankSizes) -> tuple[int, int, int]:
    """Bytes of parameters, optimizer and gradients between two micro-batches of a step.

    DeepSpeed keeps fp32 masters apart from the parameters from ZeRO-1 on, in fp32 runs too; in bf16 with ZeRO-1 whole
    fp32 gradients.
    """
    stage, all_of_it = rank.zero_stage, rank.parameters
    if stage == 3:
        share = sum(-(-weight.elements // rank.replicas) for weight in rank.weights)
        persistent = sum(w.elements for w in rank.weights if is_persistent(rank, w))
        return rank.element * (share + persistent), 12 * share, 4 * share
    share = sum(flat_shares(rank))
    optimizer = 12 * share if stage else 8 * all_of_it
    gradients = 4 * share if stage == 2 else 4 * all_of_it
    return rank.element * all_of_it, optimizer, gradients


def peak_memory(rank: RankSizes, rows: Sequence[MicroBatch], kernels: Kernels = "cuda") -> Memory:
    """The peak of a step.

    Args:
        rows: the step's micro-batches of this rank's replica.
        kernels: whose kernels run.
    """
    activations = _Activations(rank, kernels)
    kept = [activations.micro_batch(row) for row in rows]
    moments = [_at_backward(activations, kept, rows, number) for number in range(len(rows))]
    if rank.zero_stage == 3 or (rank.zero_stage == 2 and rank.element == 2):
        moments += [_while_reducing(activations, kept, rows, number) for number in range(len(rows))]
    if rank.zero_stage == 3:
        fetched = _fetched(rank)
        moments += [_while_fetching(activations, kept, rows, number, fetched) for number in range(len(rows))]
    moments += [_at_reduction(rank), _at_update(rank)]
    peak = max(moments, key=lambda memory: memory.total)
    return dataclasses.replace(peak, activations=peak.activations + activations.arena_gradients(rows))


def _at_backward(activations: _Activations, kept: Sequence[int], rows: Sequence[MicroBatch], number: int) -> Memory:
    """While micro-batch `number` runs back.

    Args:
        kept: what each micro-batch of the step keeps between its passes.
    """
    rank = activations.rank
    last = min(number + rank.in_flight, len(rows))
    others = sum(kept[number + 1 : last])
    held = kept[number]
    running = activations.while_running_back(rows[number])
    loss = _loss(rank, activations.kernels)
    if held + loss < running:
        loss = 0
    parameters, optimizer, gradients = state_bytes(rank)
    if number == 0 and rank.zero_stage < 3:
        # They appear while the activations go; but in bf16 with ZeRO-1 those in fp32 are always there.
        gradients = 4 * rank.parameters if rank.zero_stage == 1 and rank.element == 2 else 0
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        zero_buffers=_bucket(rank) + _gathered(rank) + (0 if loss else _fetched_again(rank)),
        activations=others + (held if loss else running),
        pipeline_buffers=_pipeline_buffers(rank, rows, number, last),
        loss=loss,
        moment=f"backward pass of micro-batch {number}",
    )


def _fetched(rank: RankSizes) -> dict[int, int]:
    """Bytes of whole weights that ZeRO-3 holds while each layer runs forwards.

    DeepSpeed gathers the weights that come next, as many as its prefetch bucket holds, in one flat tensor. When the
    first is needed it copies all of them out, and keeps the flat one until the last was needed.
    """
    sizes: dict[str, int] = {}
    for weight in rank.weights:
        sizes[weight.module] = sizes.get(weight.module, 0) + weight.elements * (not is_persistent(rank, weight))
    ahead = min(rank.zero_option("stage3_prefetch_bucket_size", _PREFETCH), sum(sizes.values()))
    released, modules, found = released_modules(rank), list(sizes), {}
    for layer in rank.layers:
        place = modules.index(f"layer {layer}")
        behind = sum(sizes[module] for module in modules[:place] if module not in released)
        coming = min(sum(sizes[module] for module in modules[place:]), sizes[f"layer {layer}"] + ahead)
        found[layer] = rank.element * (behind + coming + ahead)
    return found


def _while_fetching(
    activations: _Activations,
    kept: Sequence[int],
    rows: Sequence[MicroBatch],
    number: int,
    fetched: Mapping[int, int],
) -> Memory:
    """While ZeRO-3 fetches weights in the forward pass of micro-batch `number`."""
    rank = activations.rank
    first = max(number + 1 - rank.in_flight, 0)
    parameters, optimizer, gradients = state_bytes(rank)
    running, whole_weights = activations.while_running(rows[number], fetched)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        zero_buffers=_bucket(rank) + whole_weights,
        activations=sum(kept[first:number]) + running,
        pipeline_buffers=_pipeline_buffers(rank, rows, first, number, forward=True),
        loss=0,
        moment=f"forward pass of micro-batch {number}",
    )


def _while_reducing(activations: _Activations, kept: Sequence[int], rows: Sequence[MicroBatch], number: int) -> Memory:
    """While the first bucket of micro-batch `number` is reduced.

    ZeRO-3 makes a padded copy of it, beside the next gradients; ZeRO-2 in bf16 a copy in fp32.
    """
    rank = activations.rank
    last = min(number + rank.in_flight, len(rows))
    others = sum(kept[number + 1 : last])
    parameters, optimizer, gradients = state_bytes(rank)
    on_their_way = (8 if rank.zero_stage == 3 else 4) * min(
        rank.parameters, rank.zero_option("reduce_bucket_size", _BUCKET)
    )
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        zero_buffers=_bucket(rank) + _gathered(rank) + on_their_way,
        activations=others + activations.micro_batch(rows[number], rank.bounds[1] - 1),
        pipeline_buffers=_pipeline_buffers(rank, rows, number, last),
        loss=0,
        moment=f"reduction in the backward pass of micro-batch {number}",
    )


def _loss(rank: RankSizes, kernels: Kernels) -> int:
    """While the loss is made: gradients of hidden states and head, and the logits of a chunk of tokens.

    Compiled, these are in the precision of the run; else in float32, in bf16 with a copy in both directions.
    """
    if not rank.is_last:
        return 0
    hidden, rows = rank.model.hidden_size, rank.vocabulary
    elements, size = CHUNK_ELEMENTS, 6 if rank.element == 2 else 4
    if resolve_compile(rank.config.parallel.compile, torch.device(kernels)) == "inductor":
        elements, size = compiled_elements(rank.tokens, rows, rank.element), rank.element
    chunk = max(part.stop - part.start for part in chunks(rank.tokens, rows, elements=elements))
    return rank.element * hidden * (rows + rank.tokens) + size * chunk * rows


def _pipeline_buffers(
    rank: RankSizes, rows: Sequence[MicroBatch], number: int, last: int, *, forward: bool = False
) -> int:
    """Packed tensors on their way: two sends and one receive ahead in each direction, and the gradients in use.

    Args:
        number: the micro-batch that runs back, or will be the next to do so.
        last: the micro-batch that will run forwards next.
        forward: whether it does so now, which has received its input and uses no gradients.
    """

    def packed(numbers: range, leaving: bool) -> int:
        inside = [rows[each] for each in numbers if 0 <= each < len(rows)]
        sizes = [rank.packed_elements(row.leaving if leaving else row.entering) for row in inside]
        return rank.element * sum(sizes)

    total = 0
    if not rank.is_last:
        total += packed(range(last - 2, last), True) + packed(range(number, number + 2 - forward), True)
        if rank.hidden_is_split_for_sending:
            total += rank.element * rank.tokens * rank.model.hidden_size
    if not rank.is_first:
        total += packed(range(number - 2, number), False) + packed(range(last + forward, last + forward + 1), False)
    return total


def _bucket(rank: RankSizes) -> int:
    """The bucket that ZeRO holds while gradients come in; ZeRO-3 holds it always."""
    stage, elements = rank.zero_stage, rank.zero_option("reduce_bucket_size", _BUCKET)
    if stage == 0 or (stage == 1 and rank.element == 2):
        return 0
    return elements * (2 if stage == 2 and rank.element == 2 else 4)


def _gathered(rank: RankSizes) -> int:
    """Whole weights that ZeRO-3 holds when the backward pass begins."""
    if rank.zero_stage < 3:
        return 0
    released = released_modules(rank)
    return rank.element * sum(
        weight.elements for weight in rank.weights if weight.module not in released and not is_persistent(rank, weight)
    )


def _fetched_again(rank: RankSizes) -> int:
    """The largest layer's weights and gradients, where ZeRO-3 fetches weights again for the backward pass."""
    if rank.zero_stage < 3 or not released_modules(rank):
        return 0
    largest = max(sum(w.elements for w in rank.weights if w.module == f"layer {layer}") for layer in rank.layers)
    return 2 * rank.element * largest


def _at_reduction(rank: RankSizes) -> Memory:
    """While gradients are reduced over the replicas at the end of the step."""
    parameters, optimizer, gradients = state_bytes(rank)
    bucket = rank.zero_option("reduce_bucket_size", _BUCKET)
    stage, buffers = rank.zero_stage, _bucket(rank)
    if stage == 0 or (stage == 1 and rank.element == 2):
        if rank.replicas == 1:  # nothing is reduced
            return Memory(parameters, gradients, optimizer, 0, 0, 0, 0, "update")
        buffers = 4 * min(rank.parameters, _BUCKET)  # the engine's own, which no option sets
    elif stage == 1:
        buffers += 4 * bucket
    return Memory(parameters, gradients, optimizer, buffers, 0, 0, 0, "reduction of gradients")


def _at_update(rank: RankSizes) -> Memory:
    """While AdamW updates, in place."""
    parameters, optimizer, gradients = state_bytes(rank)
    stage, bf16 = rank.zero_stage, rank.element == 2
    if stage == 0:
        return Memory(parameters, gradients, optimizer, 0, 0, 0, 0, "update")
    share = flat_shares(rank)
    if stage == 1 and not bf16:
        gradients = 4 * sum(share)
    extra = 0 if bf16 and stage == 1 else 4 * max(share)  # the gradients of the largest group, made flat
    if stage == 3:
        extra += _bucket(rank)
        parameters = rank.element * (gradients // 4)  # whole weights that were kept are gathered anew afterwards
    return Memory(parameters, gradients, optimizer, extra, 0, 0, 0, "update")
