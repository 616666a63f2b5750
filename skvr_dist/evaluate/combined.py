"""What fewer cached layers cost together with quantized caches and sliding windows, each combination measured.

The text is read in stretches of `recent` tokens. Within a stretch keys and values are in full precision, those before
it are as the cache holds them: quantized, and no more than the window. That is what decoding token by token computes
with transformers' quantized caches, which keep the last `recent` tokens as they are and then quantize all at once.

Shapes: N sequences, B of a batch, S sequence length, T positions that are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from skvr_dist.data.batch import MicroBatch
from skvr_dist.evaluate.intervals import Bootstrap, Interval
from skvr_dist.evaluate.windowed_cache import held_bytes, new_cache
from skvr_dist.model.modules import token_cross_entropy
from skvr_dist.routing import CacheStrategy

FULL_BITS = 16
BITS = (FULL_BITS, 8, 4)
"""That a cached element may have; 16 is bf16, which is not quantized."""


class Form(NamedTuple):
    """How the retained layers are kept."""

    bits: int
    window: int | None
    """Tokens; None keeps the whole context."""


@dataclass(frozen=True)
class CombinedPoint:
    """One combination."""

    strategy: str
    retention: float
    bits: int
    window: int | None
    counted_bytes: float
    """Of the cache per token of context, as an engine's counter has it: elements times bits, and nothing else."""
    held_bytes: float
    """Measured at the end of a sequence, scales and zero points included, and tokens that are not quantized yet."""
    loss: float
    """Nats per token."""
    rise: Interval
    """Over full retention in bf16 without a window, nats per token."""


def combined_curve(
    model: Any,
    batches: Sequence[MicroBatch],
    strategies: Mapping[str, CacheStrategy],
    *,
    bits: Sequence[int],
    windows: Sequence[int | None],
    recent: int,
) -> list[CombinedPoint]:
    """Measure every combination; the first is what the others' rise is measured against.

    Args:
        model: one of `skvr_dist.hf` with SDPA attention, in evaluation mode.
        batches: of one sequence length.
        recent: tokens that come before they are quantized.
    """
    forms = [Form(*form) for form in product(bits, windows)]
    points: list[CombinedPoint] = []
    bootstrap, first = Bootstrap(batches), None
    total = len(strategies) * len(forms)
    for (name, strategy), form in tqdm(product(strategies.items(), forms), total=total, desc="caches", disable=None):
        model.set_cache_strategy(list(strategy.retained))
        losses, held = token_losses(model, batches, form, recent)
        first = losses if first is None else first
        points.append(
            CombinedPoint(
                strategy=name,
                retention=strategy.retention,
                bits=form.bits,
                window=form.window,
                counted_bytes=counted_bytes(model.config, strategy, form, losses.shape[1]),
                held_bytes=held / losses.numel(),
                loss=bootstrap.mean(losses).mean,
                rise=bootstrap.mean(losses - first),
            )
        )
    return points


@torch.inference_mode()
def token_losses(model: Any, batches: Sequence[MicroBatch], form: Form, recent: int) -> tuple[Tensor, int]:
    """Cross entropy in nats of every token, float32 [N, S], and the bytes that the caches of all sequences hold."""
    config, found, held = model.config, [], 0
    for batch in batches:
        cache = new_cache(config.num_hidden_layers, config.head_dim, bits=form.bits, recent=recent, window=form.window)
        stretches = []
        for start in range(0, batch.tokens.shape[1], recent):
            now = slice(start, min(start + recent, batch.tokens.shape[1]))
            logits = model(
                batch.tokens[:, now],
                attention_mask=_mask(batch, now, form.window),
                position_ids=torch.arange(now.start, now.stop, device=batch.tokens.device)[None],
                past_key_values=cache,
                use_cache=True,
            ).logits
            labels = batch.labels[:, now]
            stretches.append(token_cross_entropy(logits, labels).view_as(labels).cpu())
        found.append(torch.cat(stretches, dim=1))
        held += held_bytes(cache)
    return torch.cat(found), held


def _mask(batch: MicroBatch, now: slice, window: int | None) -> Tensor:
    """bool [B or 1, 1, S, T]: what each position of a stretch reads of the cache and of the stretch."""
    first = 0 if window is None else max(0, now.start - window)
    queries = torch.arange(now.start, now.stop, device=batch.tokens.device)[:, None]
    keys = torch.arange(first, now.stop, device=batch.tokens.device)
    mask = keys <= queries
    if window is not None:
        mask &= queries - keys < window
    if batch.documents is None:
        return mask[None, None]
    same = batch.documents[:, now, None] == batch.documents[:, None, first : now.stop]
    return (mask & same)[:, None]


def counted_bytes(config: Any, strategy: CacheStrategy, form: Form, context: int) -> float:
    """Bytes of the cache per token of a context, as `tools/estimate.py serve` and vLLM count them."""
    of_bytes = strategy.cache_bytes_per_token(
        kv_heads=config.num_key_value_heads, head_dim=config.head_dim, bytes_per_element=1
    )
    share = 1.0 if form.window is None else min(form.window, context) / context
    return of_bytes * form.bits / 8 * share
