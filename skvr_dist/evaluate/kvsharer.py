"""KVSharer's choice of the layers that share (arXiv 2410.18517), to hold a search by loss against.

The paper's definition, for any model and a calibration text:

1. The cached keys of each layer are averaged over the sequences and flattened, and so are the values. Two layers are as
   far apart as the Euclidean distances of their keys and of their values are on average.
2. Pairs of layers are tried by that distance, those farthest apart first: *dissimilar* layers share.
3. In a pair the layer nearer to the output reads the keys and values of the one nearer to the input, if it does not
   read another layer already. What read it before goes along; where the other layer reads a third one, that is read.
4. The change is kept if the hidden states before the output head stay like those of the unchanged model: the mean
   cosine over the sequences is above a threshold, 0.5.
5. It ends when as many layers share as are to.

So a layer may read any earlier one, not only the nearest that keeps a cache. (The authors' code takes norms of heads
and averages them where step 1 flattens.)

Shapes: N sequences, B of a batch, S sequence length, D hidden, K key/value heads, E head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvr_dist.data.batch import MicroBatch
from skvr_dist.evaluate.cache_plan import CachePlan
from skvr_dist.evaluate.intervals import Bootstrap, Interval
from skvr_dist.model.decoder import Decoder
from skvr_dist.model.modules import token_cross_entropy
from skvr_dist.routing import CacheStrategy

Donors = tuple[int, ...]
"""The layer that each of the L layers reads."""


@dataclass(frozen=True)
class Sharing:
    """What the search found."""

    donors: dict[int, Donors]
    """By the number of layers that keep a cache, from all on; no further than the threshold allows."""
    similarity: dict[int, float]
    """Of the hidden states to those of the unchanged model, in the same order."""
    tried: int
    """Changes that were tried, each of which runs the model over the calibration text."""


@torch.inference_mode()
def share_layers(decoder: Decoder, batches: Sequence[MicroBatch], least: int, threshold: float = 0.5) -> Sharing:
    """Search as the paper does.

    Args:
        batches: the calibration text, of one sequence length.
        least: layers that keep their cache in the end.
        threshold: that the similarity must exceed.
    """
    layers = decoder.config.num_hidden_layers
    donors: Donors = tuple(range(layers))
    unchanged = [_hidden(decoder, batch, donors) for batch in batches]
    sharing = Sharing({layers: donors}, {layers: 1.0}, 0)
    tried = 0
    for reader, donor in ranked_pairs(layer_distances(decoder, batches)):
        if len(set(donors)) <= least:
            break
        if donors[reader] != reader:
            continue
        changed = redirected(donors, reader, donor)
        similarity, tried = _similarity(decoder, batches, unchanged, changed), tried + 1
        if similarity > threshold:
            donors = changed
            sharing.donors[len(set(donors))], sharing.similarity[len(set(donors))] = donors, similarity
    return Sharing(sharing.donors, sharing.similarity, tried)


@torch.inference_mode()
def layer_distances(decoder: Decoder, batches: Sequence[MicroBatch]) -> Tensor:
    """How far apart each two layers are, float64 [L, L]."""
    layers = decoder.config.num_hidden_layers
    own = tuple(range(layers))
    sums: dict[int, list[Tensor]] = {}
    for batch in batches:
        _, known = decoder.run_layers(decoder.embed(batch.tokens), [own], {}, documents=batch.documents)
        for (layer, _), kv in known.items():
            of_batch = [part.double().sum(dim=0).flatten() for part in (kv.k, kv.v)]
            sums[layer] = [a + b for a, b in zip(sums[layer], of_batch, strict=True)] if layer in sums else of_batch
    count = sum(len(batch.tokens) for batch in batches)
    keys, values = (torch.stack([sums[layer][part] for layer in own]) / count for part in (0, 1))
    return (torch.cdist(keys, keys) + torch.cdist(values, values)).cpu() / 2


def ranked_pairs(distances: Tensor) -> list[tuple[int, int]]:
    """Pairs of a later and an earlier layer by their distance in [L, L], the farthest apart first."""
    pairs = [(later, earlier) for later in range(len(distances)) for earlier in range(later)]
    return sorted(pairs, key=lambda pair: -float(distances[pair]))


def redirected(donors: Donors, reader: int, donor: int) -> Donors:
    """A map in which one layer more reads an earlier one, or what that one reads, and its readers go along."""
    target = donors[donor]
    return tuple(target if read == reader else read for read in donors)


def _hidden(decoder: Decoder, batch: MicroBatch, donors: Donors) -> Tensor:
    """Hidden states before the output head, [B, S, D]."""
    hidden, _ = decoder.run_layers(decoder.embed(batch.tokens), [donors], {}, documents=batch.documents)
    return decoder.final(hidden)


def _similarity(decoder: Decoder, batches: Sequence[MicroBatch], unchanged: Sequence[Tensor], donors: Donors) -> float:
    """The mean over the sequences of the cosine between their flattened hidden states and the unchanged ones."""
    cosines = [
        torch.cosine_similarity(before.flatten(1), _hidden(decoder, batch, donors).flatten(1), dim=1)
        for batch, before in zip(batches, unchanged, strict=True)
    ]
    return float(torch.cat(cosines).mean())


@torch.inference_mode()
def token_losses(decoder: Decoder, batches: Sequence[MicroBatch], donors: Donors) -> Tensor:
    """Cross entropy in nats of every token with any map, float32 [N, S] on the CPU; 0 where it is ignored."""
    found = []
    for batch in batches:
        logits = decoder(batch.tokens, donors, documents=batch.documents)
        found.append(token_cross_entropy(logits, batch.labels).view_as(batch.labels).cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class SharedProfile:
    """What KVSharer makes of a planned profile's number of layers."""

    profile: str
    calibration: str
    size: int
    retained: tuple[int, ...]
    """That the search by loss chose."""
    donors: Donors | None
    """KVSharer's map; None if the threshold ends its search with more layers."""
    similarity: float | None
    rise: dict[str, Interval]
    """Of KVSharer's loss over full retention, nats per token, by test text."""
    gain: dict[str, Interval]
    """What the search by loss saves against it, nats per token; above 0 that search is better."""


def against_plan(
    decoder: Decoder,
    calibrations: Mapping[str, Sequence[MicroBatch]],
    tests: Mapping[str, Sequence[MicroBatch]],
    plan: CachePlan,
    threshold: float,
) -> list[SharedProfile]:
    """Search with KVSharer on the texts of a plan; its profiles that may use all layers are compared, by size."""
    planned = [each for each in plan.profiles if each.profile.last is None]
    least = min((each.profile.size for each in planned), default=1)
    sharings = {name: share_layers(decoder, batches, least, threshold) for name, batches in calibrations.items()}
    bootstraps = {name: Bootstrap(batches) for name, batches in tests.items()}
    layers = decoder.config.num_hidden_layers
    full = {name: token_losses(decoder, batches, tuple(range(layers))) for name, batches in tests.items()}
    found = []
    for each in planned:
        sharing, size = sharings[each.calibration], each.profile.size
        donors = sharing.donors.get(size)
        rise, gain = {}, {}
        for name, batches in tests.items() if donors else ():
            theirs = token_losses(decoder, batches, donors or ())
            ours = token_losses(decoder, batches, CacheStrategy(layers, each.retained).kv_source_layers)
            rise[name] = bootstraps[name].mean(theirs - full[name])
            gain[name] = bootstraps[name].mean(theirs - ours)
        similarity = sharing.similarity.get(size)
        found.append(
            SharedProfile(each.profile.name, each.calibration, size, each.retained, donors, similarity, rise, gain)
        )
    return found
