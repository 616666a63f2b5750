"""Time to first token, decoding speed and memory of a Hugging Face model at several cache strategies, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache

from skvr_dist.lab.bench import memory


@dataclass
class Speed:
    """One strategy at one length and batch; seconds in the order of the rounds, none if memory ran out."""

    strategy: str
    retention: float
    prompt_tokens: int
    batch: int
    cache_bytes_per_token: int = 0
    """Measured, behind the prompt."""
    peak_bytes: int | None = None
    """Of all rounds (`skvr_dist.lab.bench.memory`); None where the system does not tell."""
    ran_out_of_memory: bool = False
    first_token_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    """For all tokens after the first."""
    takes_turns: bool = True
    """Whether the strategies were run in turn, round by round."""

    def ratio_to(self, full: Speed, what: str) -> float | None:
        """This strategy's seconds over those of `full`, if both ran: the median over pairs of rounds, or of medians."""
        if self.ran_out_of_memory or full.ran_out_of_memory:
            return None
        own, others = getattr(self, what), getattr(full, what)
        if not self.takes_turns:
            return statistics.median(own) / statistics.median(others)
        return statistics.median(mine / theirs for mine, theirs in zip(own, others, strict=True))


@dataclass(frozen=True)
class LargestBatch:
    """The most sequences at once within a limit of memory."""

    strategy: str
    prompt_tokens: int
    batch: int
    """0 if not even one fits."""
    peak_bytes: int | None
    """At that batch."""
    tried: list[int]


def measure_speed(model: Any, prompt: Tensor, new_tokens: int, strategies: Sequence[str], rounds: int) -> list[Speed]:
    """Greedy decoding at each strategy in turn, so that a noisy neighbour meets all of them.

    Every round runs each strategy once, in an order that turns with the round; the first round warms up and is not
    counted. A strategy that runs out of memory is left out from then on.

    Args:
        model: one of `skvr_dist.hf`.
        prompt: int [B, S].
        new_tokens: to decode after the first.
    """
    speeds, (batch, length) = [], prompt.shape
    for spec in strategies:
        model.set_cache_strategy(spec)
        speeds.append(Speed(spec, len(model.retained_layers) / model.config.num_hidden_layers, length, batch))
    for number in tqdm(range(rounds + 1), desc=f"rounds of {batch} x {length:,} tokens", disable=None):
        for offset in range(len(speeds)):
            speed = speeds[(number + offset) % len(speeds)]
            if not speed.ran_out_of_memory:
                _run_once(model, prompt, new_tokens, speed, counts=number > 0)
    return speeds


def largest_batch(
    model: Any, prompt_tokens: int, new_tokens: int, strategy: str, *, limit: int, most: int
) -> LargestBatch:
    """The most sequences whose prompt and continuation stay within a limit.

    Args:
        limit: bytes of memory, the weights and (on a CPU) the process itself among them.
        most: sequences to try.

    Raises:
        UserError: the model alone takes more.
    """
    model.set_cache_strategy(strategy)

    def run(speed: Speed) -> None:
        memory.give_back(model.device)
        with memory.limited(model.device, limit):
            _run_once(model, random_prompt(model, speed.batch, prompt_tokens), new_tokens, speed, counts=False)

    return search_batch(run, strategy, prompt_tokens, limit=limit, most=most)


def search_batch(
    run: Callable[[Speed], None], strategy: str, prompt_tokens: int, *, limit: int, most: int
) -> LargestBatch:
    """Search the largest batch that runs within a limit.

    Args:
        run: runs the case of a `Speed` once and notes its peak, or that memory ran out.
    """
    peaks: dict[int, int | None] = {}

    def fits(batch: int) -> bool:
        speed = Speed(strategy, 0.0, prompt_tokens, batch)
        run(speed)
        peaks[batch] = speed.peak_bytes
        return not speed.ran_out_of_memory and (speed.peak_bytes is None or speed.peak_bytes <= limit)

    found = memory.largest(fits, most)
    return LargestBatch(strategy, prompt_tokens, found, peaks.get(found), list(peaks))


def random_prompt(model: Any, batch: int, tokens: int) -> Tensor:
    """int [B, S] on the model's device, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


def _run_once(model: Any, prompt: Tensor, new_tokens: int, speed: Speed, *, counts: bool) -> None:
    """Read a prompt and decode at `speed.strategy`, and note what that took."""
    model.set_cache_strategy(speed.strategy)
    note(speed, lambda: _seconds(model, prompt, new_tokens), prompt.device, counts=counts)


def note(speed: Speed, seconds: Callable[[], tuple[float, float, int]], device: torch.device, *, counts: bool) -> None:
    """Run a case once and note in `speed` what that took, or that memory ran out.

    Args:
        seconds: runs it; returns seconds to the first token, seconds for the tokens after it, and the cache's bytes per
            token.
        counts: whether the seconds are kept.
    """
    memory.reset_peak(device)
    try:
        first, decode, speed.cache_bytes_per_token = seconds()
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        speed.ran_out_of_memory, speed.first_token_seconds, speed.decode_seconds = True, [], []
    if speed.ran_out_of_memory:
        memory.give_back(device)  # here the error no longer holds what was allocated
        return
    peak = memory.peak_bytes(device)
    speed.peak_bytes = peak if peak is None else max(peak, speed.peak_bytes or 0)
    if counts:
        speed.first_token_seconds.append(first)
        speed.decode_seconds.append(decode)


@torch.inference_mode()
def _seconds(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and for those after it, and the cache's bytes per token behind the prompt."""
    cache = DynamicCache()
    started = time.perf_counter()
    token = _next_token(model, prompt, cache)
    first = time.perf_counter() - started
    held = cache_bytes(cache) // prompt.numel()
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = _next_token(model, token, cache)
    return first, time.perf_counter() - started, held


def _next_token(model: Any, tokens: Tensor, cache: Cache) -> Tensor:
    """int [B, 1], on the host's clock: reading it waits for the device."""
    token = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    token.cpu()
    return token


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache of plain tensors holds, measured."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
