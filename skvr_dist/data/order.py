"""The order of a data set: which tokens stand at any position of a lane, as a pure function.

A data set is dealt to V lanes, shard i to lane i % V. A lane is an endless stream of tokens: epoch after epoch, its
shards in an order drawn from (seed, epoch, lane), the chunks of a shard from (seed, epoch, shard), the documents of a
chunk from (seed, epoch, shard, chunk). So a lane holds one chunk in memory and any position is found from the counts in
manifest and indices.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.shards import DamageError, Dataset, OpenShard
from skvr_dist.errors import UserError

# Second words of the generator's key: what is drawn.
_SHARD_ORDER, _DOCUMENT_ORDER, _CHUNK_ORDER, ROW_ORDER, PASSAGE_ORDER, QUESTION_PLACE = 1, 2, 3, 4, 5, 6

MAX_PERIOD = 10_000
"""Largest number of sequences after which the pattern of weighted sources repeats."""


def permutation(seed: int, purpose: int, epoch: int, index: int, length: int, part: int = 0) -> NDArray[np.int64]:
    """An order of `length` things, a pure function of the other arguments.

    The ranks of raw Philox bits (Salmon et al., SC 2011), which numpy does not change between releases.
    """
    bits = np.random.Philox(key=[seed, purpose], counter=[0, part, index, epoch]).random_raw(length)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _OpenStretch:
    """One shard in one epoch, as a part of its lane."""

    start: int
    """Position of its first token in the lane."""
    epoch: int
    number: int
    """Number of the shard in its data set."""
    shard: OpenShard | None
    """None if its index is damaged."""
    order: NDArray[np.int64]
    """Chunks in the order in which they come; a damaged index counts as one chunk."""
    ends: NDArray[np.int64]
    """Where each of these chunks ends, in tokens from `start`."""


@dataclass(frozen=True)
class _Tokens:
    """A chunk as a part of its lane."""

    start: int
    tokens: NDArray[np.unsignedinteger[Any]]
    is_lost: bool = False


class Lane:
    """An endless stream of tokens over its own shards.

    Args:
        skip_damage: read what is damaged as end-of-sequence tokens that are `lost`, so that nothing else moves.
        damage: a list to which a sentence about each skipped chunk is appended when it is met.
    """

    def __init__(
        self, dataset: Dataset, lane: int, lanes: int, seed: int, *, skip_damage: bool, damage: list[str]
    ) -> None:
        self._dataset = dataset
        self._lane = lane
        self._seed = seed
        self._skip_damage = skip_damage
        self._damage = damage
        self._shards = np.arange(lane, len(dataset.manifest.shards), lanes)
        self._lengths = np.array([dataset.manifest.shards[i].tokens for i in self._shards])
        self._tokens_per_epoch = int(self._lengths.sum())
        self._stretch: _OpenStretch | None = None
        self._current = _Tokens(0, np.empty(0, dtype=np.uint16))

    def read(self, position: int, out: NDArray[np.int64], lost: NDArray[np.bool_]) -> None:
        """Fill `out` with the tokens from `position` on, and set `lost` where they are.

        Raises:
            DamageError: a chunk is damaged, unless it is to be skipped.
        """
        done = 0
        while done < len(out):
            current = self._current
            offset = position + done - current.start
            if not 0 <= offset < len(current.tokens):
                self._current = current = self._tokens_at(position + done)
                offset = position + done - current.start
            part = current.tokens[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            if current.is_lost:
                lost[done : done + len(part)] = True
            done += len(part)

    def _tokens_at(self, position: int) -> _Tokens:
        stretch = self._stretch
        if stretch is None or not stretch.start <= position < stretch.start + stretch.ends[-1]:
            self._stretch = stretch = self._stretch_at(position)
        place = int(np.searchsorted(stretch.ends, position - stretch.start, side="right"))
        start = stretch.start + (int(stretch.ends[place - 1]) if place else 0)
        chunk = int(stretch.order[place])
        try:
            if stretch.shard is not None:
                tokens, offsets = stretch.shard.read(chunk)
                documents = len(offsets) - 1
                order = permutation(self._seed, _DOCUMENT_ORDER, stretch.epoch, stretch.number, documents, chunk)
                return _Tokens(start, np.concatenate([tokens[offsets[i] : offsets[i + 1]] for i in order]))
        except DamageError as error:
            self._refuse(error)
        length = stretch.start + int(stretch.ends[place]) - start
        eos = np.uint32(self._dataset.manifest.eos_id)
        return _Tokens(start, np.broadcast_to(eos, length), is_lost=True)

    def _stretch_at(self, position: int) -> _OpenStretch:
        epoch, offset = divmod(position, self._tokens_per_epoch)
        shards = permutation(self._seed, _SHARD_ORDER, epoch, self._lane, len(self._shards))
        ends = np.cumsum(self._lengths[shards])
        place = int(np.searchsorted(ends, offset, side="right"))
        number = int(self._shards[shards[place]])
        length = int(self._lengths[shards[place]])
        start = epoch * self._tokens_per_epoch + int(ends[place]) - length
        try:
            shard = self._dataset.open_shard(number)
        except DamageError as error:
            self._refuse(error)
            return _OpenStretch(start, epoch, number, None, np.array([0]), np.array([length]))
        chunks = permutation(self._seed, _CHUNK_ORDER, epoch, number, len(shard.chunks))
        chunk_ends = np.cumsum([shard.chunks[i].tokens for i in chunks])
        return _OpenStretch(start, epoch, number, shard, chunks, chunk_ends)

    def _refuse(self, error: DamageError) -> None:
        if not self._skip_damage:
            raise error
        self._damage.append(str(error))


class Mixture:
    """Which source each sequence of a lane comes from, in exact proportion to the weights.

    The sources follow a pattern that holds each of them as often as its weight, taken as a whole number, says, as
    evenly spread as it can be. Lane v starts at entry v of the pattern, so that the sequences of a batch are mixed too.

    Raises:
        UserError: the weights have no short pattern.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        # As they are written: 0.7 is 7/10, not the nearest binary fraction.
        exact = [Fraction(str(weight)) for weight in weights.values()]
        scale = lcm(*(weight.denominator for weight in exact))
        counts = [int(weight * scale) for weight in exact]
        counts = [count // gcd(*counts) for count in counts]
        self.period = sum(counts)
        if self.period > MAX_PERIOD:
            raise UserError(
                f"the weights of data.train {weights} repeat only after {self.period} sequences, more than "
                f"{MAX_PERIOD}; give them with fewer digits, or less far apart"
            )
        self.counts = np.array(counts, dtype=np.int64)
        # Each entry is the source that is furthest behind its share.
        self._pattern = np.empty(self.period, dtype=np.int64)
        seen = np.zeros(len(counts), dtype=np.int64)
        self._seen = np.zeros((self.period + 1, len(counts)), dtype=np.int64)
        for entry in range(self.period):
            source = int(np.argmax(self.counts * (entry + 1) - seen * self.period))
            self._pattern[entry] = source
            seen[source] += 1
            self._seen[entry + 1] = seen

    def locate(self, lane: int, k: int) -> tuple[int, int]:
        """(source, number of the sequence within the lane of that source) of sequence k of a lane."""
        source = int(self._pattern[(lane + k) % self.period])
        return source, self.read_before(lane, k, source)

    def read_before(self, lane: int, k: int, source: int) -> int:
        """How many of the first k sequences of a lane come from a source."""
        start = lane % self.period
        periods, entry = divmod(start + k, self.period)
        return int(periods * self.counts[source] + self._seen[entry][source] - self._seen[start][source])


class Mixtures:
    """Mixtures that follow one another, each from a sequence of the run on; every source is read on where it was.

    Args:
        weights: of each source, by the number of the sequence from which it has them; each has one for 0.
        lanes: V; lane v holds the sequences v, v + V, ...

    Raises:
        UserError: the weights have no short pattern, or all are 0.
    """

    def __init__(self, weights: dict[str, dict[int, float]], lanes: int) -> None:
        self._lanes = lanes
        self._firsts = sorted({first for source in weights.values() for first in source})
        current = {name: source[0] for name, source in weights.items()}
        self._mixtures = []
        for first in self._firsts:
            current = {name: source.get(first, current[name]) for name, source in weights.items()}
            if not any(current.values()):
                raise UserError(f"all weights of data.train are 0 from sequence {first} on; leave one above 0")
            self._mixtures.append(Mixture(current))

    def locate(self, lane: int, k: int) -> tuple[int, int]:
        """(source, number of the sequence within the lane of that source) of sequence k of a lane."""
        if len(self._mixtures) == 1:
            return self._mixtures[0].locate(lane, k)
        begins = [max(-((lane - first) // self._lanes), 0) for first in self._firsts]  # each one's first k in this lane
        number = bisect(begins, k) - 1
        source, place = self._mixtures[number].locate(lane, k - begins[number])
        for mixture, (begin, end) in zip(self._mixtures, pairwise(begins[: number + 1]), strict=False):
            place += mixture.read_before(lane, end - begin, source)
        return source, place
