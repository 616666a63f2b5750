"""Decoding with a cache that holds only the retained layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.model.decoder import Cache, Decoder
from skvr_dist.routing import CacheStrategy


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Tensor,
    strategy: CacheStrategy,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_tokens: Collection[int] = (),
    last_tokens: Collection[int] = (),
) -> tuple[Tensor, Cache]:
    """Continue one prompt.

    Args:
        prompt: int [S].
        strategy: the layers that keep a cache.
        temperature: of the sampling; 0 takes the likeliest token.
        seed: of the sampling.
        stop_tokens: each ends the continuation, and is not part of it.
        last_tokens: each ends it, and is part of it, but for those that it begins with.

    Returns:
        the new tokens, int [at most max_new_tokens], and the cache behind them.
    """
    cache: Cache = {}
    donors = strategy.kv_source_layers
    tokens = prompt[None]
    new: list[Tensor] = []
    generator = torch.Generator(prompt.device).manual_seed(seed)
    while len(new) < max_new_tokens:
        logits = decoder(tokens, donors, cache)[0, -1].float()
        if temperature > 0:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[0]
        else:
            token = logits.argmax()
        if int(token) in stop_tokens:
            break
        new.append(token)
        if int(token) in last_tokens and any(int(each) not in last_tokens for each in new):
            break
        tokens = token.reshape(1, 1)
    return torch.stack(new) if new else prompt.new_empty(0), cache


def decode_all(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    strategy: CacheStrategy,
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int],
    last_tokens: Collection[int] = (),
    name: str,
) -> list[str]:
    """What greedy decoding gives after each prompt, up to a token that ends it, as `generate` takes them.

    A text ends where the model can read no further too.

    Args:
        prompts: int [S] each.
        name: of the strategy, for the progress bar.
    """
    device, longest = next(decoder.parameters()).device, decoder.config.max_position_embeddings
    texts = []
    for prompt in tqdm(prompts, desc=f"decoding at {name}", unit="answer", disable=None, leave=False):
        new, _ = generate(
            decoder,
            prompt.to(device),
            strategy,
            max_new_tokens=min(max_new_tokens, longest - len(prompt)),
            stop_tokens=stop_tokens,
            last_tokens=last_tokens,
        )
        # A vocabulary that was padded has ids that no text stands for.
        texts.append(tokenizer.decode([token for token in new.tolist() if token < tokenizer.vocab_size]))
    return texts


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds, measured."""
    return sum(kv.k.nbytes + kv.v.nbytes for kv in cache.values())
