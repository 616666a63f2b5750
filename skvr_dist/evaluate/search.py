"""Which layers should keep their cache: the set of each size that costs the least on given text.

Elimination begins with all layers and drops the one whose loss is then the lowest, again and again; swaps then exchange
a retained layer for another one at the same size. Elimination is lazy (Minoux, "Accelerated greedy algorithms for
maximizing submodular set functions", 1978): what a layer costs seldom falls while others are dropped, so only those are
tried again that cost less, when they were tried last, than the best one does now. Sets are judged by the loss and as a
whole: the loss is not a sum of what each layer is worth (EvoPress, arXiv 2410.14649), and likeness of keys and values
is no guide to it (KVSharer, arXiv 2410.18517).

Shapes: L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.model.decoder import Decoder
from skvr_dist.model.modules import count_labels
from skvr_dist.routing import CacheStrategy

Retained = tuple[int, ...]
"""The layers that keep a cache, ascending, layer 0 among them."""


@dataclass(frozen=True)
class Room:
    """The sets that are allowed.

    Raises:
        UserError: there are none.
    """

    num_layers: int
    required: Retained = (0,)
    """Layers that keep a cache in any case: 0, and the first ones of a serving pipeline's stages."""
    last: int | None = None
    """The highest layer that may keep one: layers above it can be left out of a prefill. None allows all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "required", tuple(sorted({0, *self.required})))
        top = self.num_layers - 1 if self.last is None else self.last
        object.__setattr__(self, "last", top)
        if not 0 <= top < self.num_layers:
            raise UserError(
                f"the last layer with a cache, {top}, must be one of the model's: 0 to {self.num_layers - 1}"
            )
        if self.required[0] < 0 or self.required[-1] > top:
            outside = next(layer for layer in self.required if not 0 <= layer <= top)
            raise UserError(f"layer {outside} is to keep its cache, but only layers 0 to {top} may")

    @property
    def largest(self) -> Retained:
        """Every layer that may keep a cache."""
        return tuple(range(int(self.last or 0) + 1))

    @property
    def count(self) -> int:
        """How many sets there are, of all sizes."""
        return 2 ** len(self.optional)

    @property
    def optional(self) -> Retained:
        """The layers that may be dropped."""
        return tuple(layer for layer in self.largest if layer not in self.required)

    def sets(self, size: int) -> Iterable[Retained]:
        """Every set of a size."""
        for chosen in itertools.combinations(self.optional, size - len(self.required)):
            yield tuple(sorted((*self.required, *chosen)))


class Search:
    """Sets of retained layers, measured and compared on the same batches.

    Args:
        batches: the calibration text.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[MicroBatch]) -> None:
        self._num_layers = decoder.config.num_hidden_layers
        self._tree = PrefixTree(decoder, batches)
        self._tokens = int(sum(count_labels(batch.labels) for batch in batches))
        self.measured: dict[Retained, float] = {}
        """The loss of every set that was tried, in nats per token."""

    @property
    def evaluated_layers(self) -> int:
        """Layers that were run over the calibration text."""
        return self._tree.evaluated_layers

    def measure(self, sets: Sequence[Retained]) -> list[float]:
        """The losses at several sets, which share the layers that they have in common."""
        new = [retained for retained in dict.fromkeys(sets) if retained not in self.measured]
        if new:
            losses = self._tree.token_losses([CacheStrategy(self._num_layers, retained) for retained in new])
            for retained, token_losses in zip(new, losses, strict=True):
                self.measured[retained] = float(token_losses.sum(dtype=torch.float64)) / self._tokens
        return [self.measured[retained] for retained in sets]

    def eliminate(self, room: Room, size: int) -> dict[int, Retained]:
        """Drop one layer after another, down to `size` layers; returns the set that was reached at each size."""
        current = room.largest
        reached = {len(current): current}
        rises = dict.fromkeys(room.optional, -math.inf)  # what dropping a layer has cost when it was tried last
        while len(current) > max(size, len(room.required)):
            droppable = sorted((layer for layer in current if layer not in room.required), key=lambda at: rises[at])
            self._tree.keep(CacheStrategy(self._num_layers, current), below=max(droppable))
            [loss] = self.measure([current])
            now: dict[int, float] = {}
            for layer in droppable:
                if now and rises[layer] >= min(now.values()):  # and so are those that follow
                    break
                now[layer] = self.measure([_without(current, layer)])[0] - loss
            rises |= now
            current = _without(current, min(now, key=lambda at: (now[at], at)))
            reached[len(current)] = current
        return reached

    def swap(self, room: Room, retained: Retained, rounds: int) -> Retained:
        """Exchange a retained layer for another one as long as that lowers the loss, at most `rounds` times."""
        for _ in range(rounds):
            kept = [layer for layer in retained if layer not in room.required]
            dropped = [layer for layer in room.optional if layer not in retained]
            if not (kept and dropped):
                break
            self._tree.keep(CacheStrategy(self._num_layers, retained), below=max(kept[-1], dropped[-1]))
            exchanged = [tuple(sorted((*_without(retained, out), into))) for out in kept for into in dropped]
            best = self._best([retained, *exchanged])
            if best == retained:
                break
            retained = best
        return retained

    def exhaust(self, room: Room, size: int) -> Retained:
        """The best of all sets of a size."""
        return self._best(list(room.sets(size)))

    def _best(self, sets: Sequence[Retained]) -> Retained:
        losses = self.measure(sets)
        return min(zip(losses, sets, strict=True))[1]


def one_shot(search: Search, room: Room, size: int) -> Retained:
    """The layers that are missed most when each is dropped alone: what scores of single layers would choose."""
    alone = [_without(room.largest, layer) for layer in room.optional]
    ranked = sorted(zip(search.measure(alone), room.optional, strict=True), reverse=True)
    return tuple(sorted((*room.required, *(layer for _, layer in ranked[: size - len(room.required)]))))


def _without(retained: Retained, layer: int) -> Retained:
    return tuple(kept for kept in retained if kept != layer)
