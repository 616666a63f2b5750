"""KVSharer's search against the paper's definition, written out with the caches of transformers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from support.hf_models import random_weights, routed_model, shape_of
from torch import Tensor

from skvr_dist.commands.kvsharer import as_table
from skvr_dist.data.batch import MicroBatch
from skvr_dist.evaluate.cache_plan import Profile, plan_caches
from skvr_dist.evaluate.kvsharer import (
    against_plan,
    layer_distances,
    ranked_pairs,
    redirected,
    share_layers,
    token_losses,
)
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

LAYERS = 6
SHAPE = shape_of("llama", num_hidden_layers=LAYERS)
WEIGHTS = random_weights(SHAPE, 0.15)
TOKENS = torch.randint(101, (6, 17), generator=torch.Generator().manual_seed(5))
BATCHES = [MicroBatch.of(TOKENS[:4]), MicroBatch.of(TOKENS[4:])]


def decoder() -> Decoder:
    decoder = Decoder(SHAPE)
    decoder.load_state_dict(WEIGHTS)
    return decoder.eval()


@torch.inference_mode()
def written_out(least: int, threshold: float) -> tuple[Tensor, list[list[int]]]:
    """Distances of the layers, and the maps after each change that was kept, sequence by sequence with transformers."""
    model = routed_model(SHAPE, WEIGHTS)
    texts = [row[None, :-1] for row in TOKENS]

    def last_hidden(sources: list[int]) -> list[np.ndarray]:
        model.model.kv_sources = tuple(sources)
        return [model.model(text, use_cache=False).last_hidden_state.numpy().ravel() for text in texts]

    caches = [model(text, use_cache=True).past_key_values for text in texts]
    keys, values = (
        [np.mean([getattr(c.layers[layer], part).numpy().ravel() for c in caches], axis=0) for layer in range(LAYERS)]
        for part in ("keys", "values")
    )
    distances = torch.zeros(LAYERS, LAYERS, dtype=torch.float64)
    for i in range(LAYERS):
        for j in range(LAYERS):
            apart = [float(np.linalg.norm(part[i] - part[j])) for part in (keys, values)]
            distances[i, j] = sum(apart) / 2
    original = last_hidden(list(range(LAYERS)))
    pairs = sorted(((float(distances[i, j]), i, j) for i in range(LAYERS) for j in range(i)), reverse=True)
    current, maps = list(range(LAYERS)), []
    for _, nearer_to_output, nearer_to_input in pairs:
        if len(set(current)) == least:
            break
        if current[nearer_to_output] != nearer_to_output:
            continue
        tried = [current[nearer_to_input] if read == nearer_to_output else read for read in current]
        pairs_of_outputs = zip(original, last_hidden(tried), strict=True)
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs_of_outputs]
        if np.mean(cosines) > threshold:
            current = tried
            maps.append(current)
    return distances, maps


@pytest.mark.parametrize(("least", "threshold"), [(2, 0.5), (1, 0.97)])
def test_the_search_is_the_papers(least: int, threshold: float) -> None:
    distances, maps = written_out(least, threshold)
    torch.testing.assert_close(layer_distances(decoder(), BATCHES), distances, rtol=1e-4, atol=1e-4)
    found = share_layers(decoder(), BATCHES, least, threshold)
    assert list(found.donors.values()) == [tuple(range(LAYERS)), *map(tuple, maps)]
    assert all(one - other == 1 for one, other in pairwise(found.donors))
    assert all(similarity > threshold for similarity in found.similarity.values())


def test_the_farthest_pair_is_first_and_readers_go_along() -> None:
    distances = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]])
    assert ranked_pairs(distances) == [(2, 0), (2, 1), (1, 0)]
    assert redirected((0, 1, 2, 3), 3, 1) == (0, 1, 2, 1)
    assert redirected((0, 1, 2, 1), 1, 0) == (0, 0, 2, 0)  # 3 read 1
    assert redirected((0, 0, 2, 3), 3, 1) == (0, 0, 2, 0)  # 1 reads 0


def test_the_loss_of_any_map() -> None:
    """A map that is a strategy's costs what the strategy costs; another one costs something else."""
    strategy = CacheStrategy(LAYERS, (0, 2, 4))
    expected = PrefixTree(decoder(), BATCHES).token_losses([strategy])[0]
    torch.testing.assert_close(token_losses(decoder(), BATCHES, strategy.kv_source_layers), expected)
    assert not torch.allclose(token_losses(decoder(), BATCHES, (0, 0, 2, 0, 4, 2)), expected, atol=1e-2)


def test_a_plan_is_held_against_it() -> None:
    """What the plan saves is the difference of both losses; a threshold that nothing passes leaves no map."""
    profiles = [Profile("half", 3), Profile("bulk", 1), Profile("fast", 2, last=3)]
    texts = {"text": BATCHES}
    plan = plan_caches(decoder(), texts, texts, profiles)
    half, bulk = against_plan(decoder(), texts, texts, plan, 0.1)
    assert half.donors and len(set(half.donors)) == 3 and bulk.donors == (0,) * LAYERS
    rise = plan.profiles[0].tested["text"].rise.mean
    assert half.gain["text"].mean == pytest.approx(half.rise["text"].mean - rise, abs=1e-5)
    assert bulk.gain["text"].mean == pytest.approx(0, abs=1e-6)
    none = against_plan(decoder(), texts, texts, plan, 1.0)
    assert [each.donors for each in none] == [None, None]
    assert "none with a similarity above 1" in as_table(none, "text", 1.0)
    assert "5>0" in as_table([half, bulk], "text", 0.1)
