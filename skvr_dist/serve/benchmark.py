"""Throughput of vLLM at several cache strategies under one budget for the cache, measured in one run."""

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


@dataclass
class Throughput:
    """One strategy; tokens per second in the order of the rounds."""

    strategy: str
    cache_tokens: int = 0
    """Tokens that the budget holds, as vLLM reports it."""
    tokens_per_second: list[float] = field(default_factory=list)
    """Generated tokens of all requests over the time until the last one is done."""

    def ratio_to(self, other: Throughput) -> float:
        """Median over the rounds of this strategy's throughput over the other's in the same round."""
        pairs = zip(self.tokens_per_second, other.tokens_per_second, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def measure_throughput(
    model: Path,
    strategies: Sequence[str],
    *,
    budget_bytes: int,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> list[Throughput]:
    """Serve the same requests at each strategy in turn, with an engine of its own each time.

    Args:
        model: an export.
        budget_bytes: for the cache, whatever the strategy.
        rounds: of each strategy.
    """
    found = {spec: Throughput(spec) for spec in strategies}
    for spec in tqdm(list(strategies) * rounds, desc="engines", disable=None):
        tokens_per_second, found[spec].cache_tokens = _serve(
            model, spec, budget_bytes, requests, prompt_tokens, new_tokens
        )
        found[spec].tokens_per_second.append(tokens_per_second)
    return list(found.values())


def _serve(
    model: Path, strategy: str, budget_bytes: int, requests: int, prompt_tokens: int, new_tokens: int
) -> tuple[float, int]:
    llm = LLM(
        str(model),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=prompt_tokens + new_tokens,
        max_num_seqs=requests,
        kv_cache_memory_bytes=budget_bytes,
        hf_overrides={"kv_profile": strategy},
    )
    try:
        vocabulary = llm.llm_engine.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(vocabulary, (requests, prompt_tokens), generator=generator).tolist()
        inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate(inputs[:2], sampling, use_tqdm=False)  # the first requests warm up
        started = time.perf_counter()
        llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None
        return requests * new_tokens / seconds, cache.num_gpu_blocks * cache.block_size
    finally:
        llm.llm_engine.engine_core.shutdown()
