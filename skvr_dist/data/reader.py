"""The streaming reader: which tokens each micro-batch holds, whatever the number of replicas and wherever it starts.

A data set is dealt to V lanes, shard i to lane i % V. A lane is an endless stream of tokens: epoch after epoch, its
shards in an order drawn from (seed, epoch, lane), the documents of a shard in an order drawn from (seed, epoch,
shard). Sequence k of a lane is its tokens [k * S, k * S + S]: S + 1 of them, the last one the first of the next
sequence. Sequence n of the run is sequence n // V of lane n % V. So a position is a number, and any sequence can be
read without reading those before it.

Shapes: B sequences of a micro-batch, S sequence length, N sequences, Q micro-batches of a step, V lanes.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skvr_dist.data.shards import Dataset
from skvr_dist.errors import UserError

# Second words of the generator's key: what is drawn.
_SHARD_ORDER = 1
_DOCUMENT_ORDER = 2


def _permutation(seed: int, purpose: int, epoch: int, index: int, length: int) -> NDArray[np.int64]:
    """An order of `length` things, a pure function of the other arguments.

    The ranks of raw Philox bits (Salmon et al., SC 2011), which numpy does not change between releases.
    """
    bits = np.random.Philox(key=[seed, purpose], counter=[0, 0, index, epoch]).random_raw(length)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Stretch:
    """One shard in one epoch, as a part of its lane."""

    start: int
    """Position of its first token in the lane."""
    tokens: NDArray[np.unsignedinteger[Any]]


class _Lane:
    """An endless stream of tokens over its own shards. Holds one shard in memory."""

    def __init__(self, dataset: Dataset, lane: int, lanes: int, seed: int) -> None:
        self._dataset = dataset
        self._lane = lane
        self._seed = seed
        self._shards = np.arange(lane, len(dataset.manifest.shards), lanes)
        self._lengths = np.array([dataset.manifest.shards[i].tokens for i in self._shards])
        self._tokens_per_epoch = int(self._lengths.sum())
        self._current = _Stretch(0, np.empty(0, dtype=np.uint16))

    def read(self, position: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the tokens from `position` on."""
        done = 0
        while done < len(out):
            stretch = self._stretch_at(position + done)
            offset = position + done - stretch.start
            part = stretch.tokens[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def _stretch_at(self, position: int) -> _Stretch:
        current = self._current
        if not current.start <= position < current.start + len(current.tokens):
            epoch, offset = divmod(position, self._tokens_per_epoch)
            order = _permutation(self._seed, _SHARD_ORDER, epoch, self._lane, len(self._shards))
            ends = np.cumsum(self._lengths[order])
            place = int(np.searchsorted(ends, offset, side="right"))
            shard = int(self._shards[order[place]])
            start = epoch * self._tokens_per_epoch + int(ends[place] - self._lengths[order[place]])
            self._current = current = _Stretch(start, self._shuffled(shard, epoch))
        return current

    def _shuffled(self, shard: int, epoch: int) -> NDArray[np.unsignedinteger[Any]]:
        tokens, offsets = self._dataset.read_shard(shard)
        documents = len(offsets) - 1
        order = _permutation(self._seed, _DOCUMENT_ORDER, epoch, shard, documents)
        return np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in order])


class SequenceStream:
    """Every sequence of a run by its number.

    Args:
        dataset: the training set; each of its shards belongs to one lane.
        sequence_length: S, tokens that the model reads; a sequence has one more, the last label.
        lanes: V.
        seed: draws the order of shards and documents.

    Raises:
        UserError: fewer shards than lanes; and while reading, a damaged shard.
    """

    def __init__(self, dataset: Dataset, *, sequence_length: int, lanes: int, seed: int) -> None:
        shards = len(dataset.manifest.shards)
        if shards < lanes:
            raise UserError(
                f"data set {dataset.folder} has {shards} shards, fewer than data.lanes {lanes}; use at most {shards} "
                f"lanes, or prepare it with --shards {lanes}"
            )
        self.sequence_length = sequence_length
        self._dataset = dataset
        self._seed = seed
        self._lanes = [_Lane(dataset, lane, lanes, seed) for lane in range(lanes)]

    @property
    def lanes(self) -> int:
        """V."""
        return len(self._lanes)

    def read(self, number: int, out: NDArray[np.int64]) -> None:
        """Fill `out` [S + 1] with sequence `number` of the run."""
        position, lane = divmod(number, self.lanes)
        self._lanes[lane].read(position * self.sequence_length, out)

    def fingerprint(self) -> str:
        """Equal for two streams with the same sequences, so that a number means the same place in both."""
        decisive = {
            "order": 1,  # raise it when the rules of this file change what a number means
            "shards": [shard.sha256 for shard in self._dataset.manifest.shards],
            "sequence_length": self.sequence_length,
            "lanes": self.lanes,
            "seed": self._seed,
        }
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]


class MicroBatchReader(Iterator[Tensor]):
    """The micro-batches that one data-parallel replica runs, without end: int64 [B, S + 1] on the CPU.

    Micro-batch q of step t holds sequences t * Q * B + q * B to t * Q * B + (q + 1) * B - 1 of the run. Replica r of
    R runs q = r, r + R, ... So no sequence changes with R, and each replica reads lanes of its own.

    The place of a run is the number of sequences that it has consumed, Q * B per step; `start_step` goes there at
    once, and the fingerprint of the sequences tells whether the number still means the same.

    Args:
        sequences: the sequences of the run; its lanes must suit B x R.
        micro_batch_size: B.
        micro_batches_per_step: Q, over all replicas.
        replica, replicas: r and R.
        start_step: the step of the first micro-batch.
        prefetch: micro-batches read ahead by a background thread; 0 reads when asked. A mistake that the thread
            meets is raised in its place.

    Raises:
        UserError: see `SequenceStream`; and lanes or micro-batches that the replicas cannot share equally.
    """

    def __init__(
        self,
        sequences: SequenceStream,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int,
        replica: int = 0,
        replicas: int = 1,
        start_step: int = 0,
        prefetch: int = 0,
    ) -> None:
        if sequences.lanes % (micro_batch_size * replicas):
            raise UserError(
                f"data.lanes {sequences.lanes} must be a multiple of micro-batch size x replicas = "
                f"{micro_batch_size} x {replicas}, so that each replica reads lanes of its own"
            )
        if micro_batches_per_step % replicas:
            raise UserError(f"{micro_batches_per_step} micro-batches of a step cannot be shared by {replicas} replicas")
        # A step has as many micro-batches for one replica as for another, so those of replica r are r, r + R, ... of
        # the whole run too.
        numbers = count(start_step * micro_batches_per_step + replica, replicas)
        batches = _micro_batches(sequences, numbers, micro_batch_size)
        self._batches = _read_ahead(batches, prefetch) if prefetch else batches

    def __next__(self) -> Tensor:
        return next(self._batches)


def _micro_batches(stream: SequenceStream, numbers: Iterable[int], size: int) -> Iterator[Tensor]:
    for number in numbers:
        batch = np.empty((size, stream.sequence_length + 1), dtype=np.int64)
        for row, out in enumerate(batch):
            stream.read(number * size + row, out)
        yield torch.from_numpy(batch)


def _read_ahead(batches: Iterator[Tensor], ahead: int) -> Iterator[Tensor]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        pending = deque(thread.submit(next, batches) for _ in range(ahead))
        while True:
            batch = pending.popleft().result()
            pending.append(thread.submit(next, batches))
            yield batch
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def validation_sequences(dataset: Dataset, *, sequence_length: int, num_sequences: int) -> Tensor:
    """The first sequences of a held-out data set, in stored order: int64 [N, S + 1].

    Sequence k is tokens [k * S, k * S + S], so every token but the first is predicted once. Nothing is shuffled.

    Raises:
        UserError: the data set holds fewer sequences (it is never repeated), or a shard is damaged.
    """
    available = (dataset.manifest.tokens - 1) // sequence_length
    if available < num_sequences:
        raise UserError(
            f"data set {dataset.folder} holds {available} sequences of {sequence_length} tokens, but {num_sequences} "
            f"are asked for; lower evaluate.sequences or hold out a larger share"
        )
    needed = num_sequences * sequence_length + 1
    parts: list[NDArray[np.unsignedinteger[Any]]] = []
    found = 0
    while found < needed:
        parts.append(dataset.read_shard(len(parts)).tokens)
        found += len(parts[-1])
    tokens = torch.from_numpy(np.concatenate(parts)[:needed].astype(np.int64))
    return tokens.unfold(0, sequence_length + 1, sequence_length).contiguous()
