"""What fits on a GPU that serves: how many sequences at which cache strategy, and when two servers hold more than one.

Memory is that of weights and caches, which follow from the model's shape; what an engine takes beside them (activations
of its largest batch, captured graphs) is given. Cache is counted in whole blocks of tokens, as engines hand it out.

Shapes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.model.decoder import Decoder, DecoderLayer
from skvr_dist.routing import CacheStrategy

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
"""Of an element, by the name of its type."""


@dataclass(frozen=True)
class Server:
    """A GPU and what is asked of it."""

    memory: int
    """Bytes that the engine may use."""
    other: int
    """Bytes of them that are neither weights nor cache."""
    context: int
    """Tokens of a sequence, prompt and answer together."""
    weight_bytes: int
    """Of an element."""
    cache_bytes: int
    """Of an element."""
    block: int
    """Tokens of a block of the cache."""


@dataclass(frozen=True)
class Fit:
    """One strategy on that server."""

    name: str
    strategy: CacheStrategy
    weights: int
    """Bytes; readers have no key and value projections."""
    cache_bytes_per_token: int
    tokens: int
    """That the cache holds, in whole blocks; below 0 where not even the weights fit."""
    sequences: int
    """Of the whole context that are in the cache at once."""


def fit_strategies(model: ModelConfig, server: Server, strategies: Mapping[str, CacheStrategy]) -> list[Fit]:
    """What fits at each strategy.

    Raises:
        UserError: the context is longer than the model's.
    """
    if server.context > model.max_position_embeddings:
        raise UserError(
            f"a context of {server.context:,} tokens is more than the model's {model.max_position_embeddings:,}; "
            f"give at most that"
        )
    with torch.device("meta"):
        decoder = Decoder(model)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    layers = [layer for layer in decoder.modules() if isinstance(layer, DecoderLayer)]
    of_readers = [sum(p.numel() for p in layer.self_attn.kv_parameters()) for layer in layers]
    found = []
    for name, strategy in strategies.items():
        readers = set(range(model.num_hidden_layers)) - set(strategy.retained)
        weights = (parameters - sum(of_readers[layer] for layer in readers)) * server.weight_bytes
        per_token = strategy.cache_bytes_per_token(
            kv_heads=model.num_key_value_heads, head_dim=model.head_dim, bytes_per_element=server.cache_bytes
        )
        tokens = tokens_that_fit(server.memory - server.other - weights, per_token, server.block)
        blocks = -(-server.context // server.block)
        found.append(Fit(name, strategy, weights, per_token, tokens, max(0, tokens // (blocks * server.block))))
    return found


def tokens_that_fit(memory: int, bytes_per_token: int, block: int) -> int:
    """Tokens that whole blocks in so many bytes hold, as vLLM's `num_gpu_blocks` x `block_size` counts them."""
    return memory // (bytes_per_token * block) * block


@dataclass(frozen=True)
class BreakEven:
    """One server for all requests against two engines on the same GPU, each with the weights."""

    best: Fit
    """What the one server runs."""
    bulk: Fit
    """What the second engine runs beside it."""
    share: float | None
    """The two hold more sequences while no more than this share of the requests needs the better cache. None: they
    never do, because what the second engine takes beside its cache is more than the smaller caches save."""


def break_even(server: Server, best: Fit, bulk: Fit) -> BreakEven:
    """When a premium and a bulk engine side by side pay.

    With W and w the weights, C and c the cache bytes of a sequence, and M the memory for both, one server holds
    (M - W) / C sequences. Two hold n of them, a share p of them at C, if W + w + n (p C + (1 - p) c) = M.
    """
    room = server.memory - server.other
    one, two = room - best.weights, room - server.other - best.weights - bulk.weights
    if two <= 0 or best.cache_bytes_per_token <= bulk.cache_bytes_per_token:
        return BreakEven(best, bulk, None)
    large, small = best.cache_bytes_per_token, bulk.cache_bytes_per_token
    share = (two / one * large - small) / (large - small)
    return BreakEven(best, bulk, share if share > 0 and math.isfinite(share) else None)
