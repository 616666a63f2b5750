"""Time to first token and decoding speed of a Hugging Face model at several cache strategies, measured in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache


@dataclass
class Speed:
    """One strategy; seconds in the order of the rounds."""

    strategy: str
    retention: float
    cache_bytes_per_token: int = 0
    """Measured."""
    first_token_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    """For all tokens after the first."""

    def ratio_to(self, full: Speed, what: str) -> float:
        """Median over the rounds of this strategy's seconds over those of `full` in the same round."""
        pairs = zip(getattr(self, what), getattr(full, what), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@torch.inference_mode()
def measure_speed(model: Any, prompt: Tensor, new_tokens: int, strategies: Sequence[str], rounds: int) -> list[Speed]:
    """Greedy decoding at each strategy in turn, so that a noisy neighbour meets all of them.

    Every round runs each strategy once, in an order that turns with the round; the first round warms up and is not
    counted.

    Args:
        model: one of `skvr_dist.hf`.
        prompt: int [B, S].
        new_tokens: to decode after the first.
    """
    speeds = []
    for spec in strategies:
        model.set_cache_strategy(spec)
        speeds.append(Speed(spec, len(model.retained_layers) / model.config.num_hidden_layers))
    for number in tqdm(range(rounds + 1), desc="rounds", disable=None):
        for offset in range(len(speeds)):
            speed = speeds[(number + offset) % len(speeds)]
            model.set_cache_strategy(speed.strategy)
            cache = DynamicCache()
            started = time.perf_counter()
            token = _next_token(model, prompt, cache)
            first = time.perf_counter()
            speed.cache_bytes_per_token = cache_bytes(cache) // prompt.numel()
            decode_started = time.perf_counter()
            for _ in range(new_tokens):
                token = _next_token(model, token, cache)
            if number > 0:
                speed.first_token_seconds.append(first - started)
                speed.decode_seconds.append(time.perf_counter() - decode_started)
    return speeds


def _next_token(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """int [B, 1], on the host's clock: reading it waits for the device."""
    token = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    token.cpu()
    return token


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache of plain tensors holds, measured."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
