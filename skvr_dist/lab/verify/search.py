"""The search for the layers of a smaller cache held against all sets there are, and what sharing layers saves.

Shapes: L layers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from skvr_dist.data.batch import MicroBatch
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.evaluate.search import Retained, Room, Search
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy


@dataclass(frozen=True)
class SizeFound:
    """What the search finds at one size, against every set of it. Losses in nats per token."""

    size: int
    sets: int
    best: float
    median: float
    eliminated: float
    """After elimination alone."""
    swapped: float
    """After swaps."""
    found: Retained
    wanted: Retained
    """The best set."""

    @property
    def gap(self) -> float:
        """Where the found set lies between the best one, 0, and the median, 1; 0 where all sets are alike."""
        return (self.swapped - self.best) / (self.median - self.best) if self.median > self.best else 0.0


@dataclass(frozen=True)
class SearchCheck:
    """The search at every size, and what elimination took."""

    sizes: list[SizeFound]
    evaluated_layers: int
    """Layers that elimination from all layers down to one ran over the text."""
    layers_of_plain: int
    """What elimination would run that tries all layers each time, and all sets one by one."""

    @property
    def share(self) -> float:
        """Of the layers of plain elimination."""
        return self.evaluated_layers / self.layers_of_plain


def check_search(decoder: Decoder, batches: Sequence[MicroBatch], swap_rounds: int) -> SearchCheck:
    """Eliminate from L layers down to one, swap at each size, and measure all 2^(L - 1) sets.

    Args:
        batches: the text that all of it is measured on.
        swap_rounds: exchanges at each size, at most.
    """
    layers = decoder.config.num_hidden_layers
    room = Room(layers)
    search = Search(decoder, batches)
    reached = search.eliminate(room, 1)
    evaluated, plain = search.evaluated_layers, layers * (1 + sum(len(retained) - 1 for retained in reached.values()))
    found = {size: search.swap(room, retained, swap_rounds) for size, retained in reached.items()}
    truth = Search(decoder, batches)
    sizes = range(1, layers + 1)
    truth.measure([retained for size in sizes for retained in room.sets(size)])
    return SearchCheck([_at(size, truth, room, reached[size], found[size]) for size in sizes], evaluated, plain)


def _at(size: int, truth: Search, room: Room, reached: Retained, found: Retained) -> SizeFound:
    losses = {retained: truth.measured[retained] for retained in room.sets(size)}
    wanted = min(losses, key=lambda retained: losses[retained])
    return SizeFound(
        size=size,
        sets=len(losses),
        best=losses[wanted],
        median=statistics.median(losses.values()),
        eliminated=losses[reached],
        swapped=losses[found],
        found=found,
        wanted=wanted,
    )


@dataclass(frozen=True)
class SharedTime:
    """Several strategies measured together and one by one, taking turns."""

    strategies: list[str]
    together_layers: int
    alone_layers: int
    ratios: list[float]
    """Seconds together over seconds alone, of each round."""

    @property
    def share(self) -> float:
        """Layers together over layers alone."""
        return self.together_layers / self.alone_layers

    @property
    def ratio(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.ratios)


def time_shared(decoder: Decoder, batches: Sequence[MicroBatch], strategies: Sequence[str], rounds: int) -> SharedTime:
    """Measure a curve of several strategies at once and each alone, in turns, after one round that is not counted."""
    parsed = [CacheStrategy.parse(spec, decoder.config.num_hidden_layers) for spec in strategies]
    ratios, together, alone = [], 0, 0
    for _ in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        began = time.perf_counter()
        together = _measured(decoder, batches, parsed)
        between = time.perf_counter()
        alone = sum(_measured(decoder, batches, [strategy]) for strategy in parsed)
        ratios.append((between - began) / (time.perf_counter() - between))
    return SharedTime(list(strategies), together, alone, ratios[1:])


def _measured(decoder: Decoder, batches: Sequence[MicroBatch], strategies: Sequence[CacheStrategy]) -> int:
    """Layers that were run."""
    tree = PrefixTree(decoder, batches)
    tree.token_losses(strategies)
    return tree.evaluated_layers
