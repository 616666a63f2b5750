"""vLLM at several cache strategies under one budget for the cache, measured in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm import LLM, SamplingParams

from skvr_dist.lab.bench.generate_vllm import let_bytes_be_given


@dataclass
class Serving:
    """One strategy; one value of each list for each engine, in the order of the rounds."""

    strategy: str
    cache_tokens: int = 0
    """Tokens that the budget holds, as vLLM reports it."""
    tokens_per_second: list[float] = field(default_factory=list)
    """Generated tokens of all requests over the time until the last one is done."""
    first_token_seconds: list[float] = field(default_factory=list)
    """Time to first token of one long prompt alone; the median over several prompts."""

    def ratio_to(self, other: Serving, what: str) -> float:
        """Median over the rounds of this strategy's figure over the other's in the same round."""
        pairs = zip(getattr(self, what), getattr(other, what), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@dataclass(frozen=True)
class Load:
    """The requests that an engine serves."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    """Tokens generated for each request."""
    long_prompt_tokens: int
    """Tokens of the long prompts, which are served one at a time and answered with one token."""
    long_prompts: int = 7

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prompt_tokens + self.new_tokens, self.long_prompt_tokens + 1)


def measure_serving(
    model: Path, strategies: Sequence[str], load: Load, *, positions: int, dtype: str, budget_bytes: int, rounds: int
) -> list[Serving]:
    """Serve the same requests at each strategy in turn, with an engine of its own each time and fast prefill.

    Args:
        model: an export.
        positions: that its configuration has; longer prompts are timed all the same.
        dtype: of weights and cache; left to itself vLLM makes bfloat16 of float32.
        budget_bytes: for the cache, whatever the strategy.
        rounds: of each strategy.
    """
    found = {spec: Serving(spec) for spec in strategies}
    for spec in tqdm(list(strategies) * rounds, desc="engines", disable=None):
        _serve(model, found[spec], load, positions, dtype, budget_bytes)
    return list(found.values())


def _serve(model: Path, found: Serving, load: Load, positions: int, dtype: str, budget_bytes: int) -> None:
    let_bytes_be_given()
    llm = LLM(
        str(model),
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=load.longest,
        max_num_batched_tokens=max(load.longest, 2048),
        max_num_seqs=load.requests,
        kv_cache_memory_bytes=budget_bytes,
        kv_sharing_fast_prefill=True,
        hf_overrides={"kv_profile": found.strategy, "max_position_embeddings": max(load.longest, positions)},
    )
    try:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(0)

        def seconds(prompts: int, prompt_tokens: int, new_tokens: int) -> float:
            tokens = torch.randint(vocabulary, (prompts, prompt_tokens), generator=generator).tolist()
            inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in tokens]
            sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
            started = time.perf_counter()
            llm.generate(inputs, sampling, use_tqdm=False)
            return time.perf_counter() - started

        seconds(2, load.prompt_tokens, load.new_tokens)  # the first requests warm up
        taken = seconds(load.requests, load.prompt_tokens, load.new_tokens)
        found.tokens_per_second.append(load.requests * load.new_tokens / taken)
        alone = [seconds(1, load.long_prompt_tokens, 1) for _ in range(load.long_prompts)]
        found.first_token_seconds.append(statistics.median(alone))
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None
        found.cache_tokens = cache.num_gpu_blocks * cache.block_size
    finally:
        llm.llm_engine.engine_core.shutdown()
