"""Measuring many cache strategies at once: what they have in common is computed once.

The hidden states after a layer depend on the donors of the layers up to it and on nothing above. So strategies are the
leaves of a tree whose edges are layers, and each edge is evaluated once, depth first: beside the hidden states of one
path nothing is held. All 128 strategies of 8 layers cost 255 layers instead of 1,024.

Shapes: N sequences, S sequence length, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from skvr_dist.data.batch import MicroBatch
from skvr_dist.model.decoder import KV, Decoder
from skvr_dist.model.documents import Documents
from skvr_dist.model.modules import token_cross_entropy
from skvr_dist.routing import CacheStrategy


class _State(NamedTuple):
    """Where a path through the layers has come to, for one batch."""

    hidden: Tensor
    """[B, S, D]."""
    known: dict[int, KV]
    """Keys and values of the retained layers so far."""


class PrefixTree:
    """A decoder over the same batches at one set of strategies after another.

    Args:
        batches: of one sequence length.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[MicroBatch]) -> None:
        self._decoder, self._batches = decoder, batches
        self._kept_path: tuple[int, ...] = ()
        self._kept: list[list[_State]] = []
        self._layer_calls = 0

    @property
    def evaluated_layers(self) -> int:
        """Layers that were run over all batches so far."""
        return self._layer_calls // max(1, len(self._batches))

    @torch.inference_mode()
    def token_losses(self, strategies: Sequence[CacheStrategy]) -> list[Tensor]:
        """Cross entropy in nats of every token at each strategy, float32 [N, S] on the CPU; 0 where it is ignored."""
        paths = list(dict.fromkeys(strategy.kv_source_layers for strategy in strategies))
        found: dict[tuple[int, ...], list[Tensor]] = {path: [] for path in paths}
        layers, what = self._layers_to_run(paths) * len(self._batches), f"{len(paths)} strategies"
        with tqdm(total=layers, desc=what, unit="layer", leave=False, disable=None) as bar:
            for number, batch in enumerate(self._batches):
                for path, losses in self._walk(number, batch, bar.update).losses(paths).items():
                    found[path].append(losses)
        return [torch.cat(found[strategy.kv_source_layers]) for strategy in strategies]

    @torch.inference_mode()
    def keep(self, strategy: CacheStrategy, below: int) -> None:
        """Hold what the layers below one compute at a strategy, so that later ones begin where they part from it.

        That takes `below` x N x S x D elements, and the keys and values of the retained layers.
        """
        path = strategy.kv_source_layers[:below]
        self._kept = [self._walk(number, batch).states(path) for number, batch in enumerate(self._batches)]
        self._kept_path = path

    def _walk(self, number: int, batch: MicroBatch, show: Callable[[], object] = lambda: None) -> _Walk:
        def count() -> None:
            self._layer_calls += 1
            show()

        return _Walk(self._decoder, batch, self._kept_path, self._kept[number] if self._kept else [], count)

    def _layers_to_run(self, paths: Sequence[tuple[int, ...]]) -> int:
        """Edges of the tree of these paths that are not kept."""
        prefixes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
        return sum(prefix != self._kept_path[: len(prefix)] for prefix in prefixes)


class _Walk:
    """The tree over one batch.

    Args:
        kept_path: the donors of a path's first layers.
        kept: what `states` said of it.
        on_layer: called after each layer that was run.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: MicroBatch,
        kept_path: tuple[int, ...],
        kept: list[_State],
        on_layer: Callable[[], object],
    ) -> None:
        self._decoder, self._batch, self._on_layer = decoder, batch, on_layer
        self._kept_path, self._kept = kept_path, kept
        embedded = decoder.embed(batch.tokens)
        self._start = _State(embedded, {})
        documents = None if batch.documents is None else Documents.of(batch.documents).to(embedded.device)
        self._rope, self._scopes = decoder.surroundings(embedded, documents)

    def losses(self, paths: Sequence[tuple[int, ...]]) -> Mapping[tuple[int, ...], Tensor]:
        """Token losses [B, S] of each path, int [L]."""
        return dict(self._below(0, self._start, paths, is_kept=True))

    def states(self, path: tuple[int, ...]) -> list[_State]:
        """Where a path, int [0 .. L], is before each of its layers, and at its end."""
        states, is_kept = [self._start], True
        for layer, donor in enumerate(path):
            is_kept = is_kept and self._keeps(layer, donor)
            states.append(self._kept[layer + 1] if is_kept else self._step(states[-1], layer, donor))
        return states

    def _below(
        self, layer: int, state: _State, paths: Sequence[tuple[int, ...]], is_kept: bool
    ) -> list[tuple[tuple[int, ...], Tensor]]:
        if layer == len(self._decoder.layers):
            losses = token_cross_entropy(self._decoder.logits(state.hidden), self._batch.labels)
            return [(paths[0], losses.view_as(self._batch.labels).cpu())]
        found = []
        for donor in dict.fromkeys(path[layer] for path in paths):
            child_is_kept = is_kept and self._keeps(layer, donor)
            child = self._kept[layer + 1] if child_is_kept else self._step(state, layer, donor)
            found += self._below(layer + 1, child, [path for path in paths if path[layer] == donor], child_is_kept)
        return found

    def _keeps(self, layer: int, donor: int) -> bool:
        """Whether the kept path goes through a layer with that donor."""
        return layer < len(self._kept_path) and self._kept_path[layer] == donor

    def _step(self, state: _State, layer: int, donor: int) -> _State:
        """One layer further; a layer's own keys and values are read if it reads them itself (`CacheStrategy`)."""
        given = None if donor == layer else state.known[donor]
        hidden, own = self._decoder.layers[str(layer)](
            state.hidden, self._rope, [given], own_is_read=given is None, past=None, scopes=self._scopes
        )
        self._on_layer()
        return _State(hidden, {**state.known, layer: own[0]} if own else state.known)
