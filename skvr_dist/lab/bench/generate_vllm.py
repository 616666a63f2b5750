"""The figures of `skvr_dist.lab.bench.generate` for vLLM: an engine in this process for each case.

Each engine has a cache of just as many blocks as the case needs, so that its peak of memory is what the case takes and
not what vLLM would set aside. Timed ones read the whole batch in one step, as transformers does; for the largest batch
prompts are read in vLLM's own steps, because a server never reads all of them at once. Layers above the last retained
one see a prompt's last position alone (`--kv-sharing-fast-prefill`), for which vLLM runs without captured graphs.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from skvr_dist.lab.bench import memory
from skvr_dist.lab.bench.generate import LargestBatch, Speed, note, search_batch
from skvr_dist.routing import CacheStrategy

# What vLLM takes by itself, on a CPU and on a GPU.
_BLOCK = {"cpu": 128, "cuda": 16}
_OVERRIDES_BYTES = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class Served:
    """A folder that vLLM loads."""

    folder: Path
    has_weights: bool
    """Else it is a configuration alone, and weights are made up."""
    dtype: str
    strategies: Mapping[str, CacheStrategy]
    """By the names under which engines are started."""
    kv_heads: int
    head_dim: int
    vocab_size: int
    positions: int
    """That its configuration has; longer prompts are timed all the same."""


def let_bytes_be_given() -> None:
    """Set aside a variable that makes vLLM's build for CPUs ignore `kv_cache_memory_bytes`."""
    os.environ.pop(_OVERRIDES_BYTES, None)


def device() -> torch.device:
    """Where this build of vLLM computes."""
    return torch.device(current_platform.device_type)


def measure_speed(served: Served, prompt_tokens: int, batch: int, new_tokens: int, rounds: int) -> list[Speed]:
    """Greedy decoding at each strategy, all rounds of a strategy with one engine; the first round is not counted."""
    speeds = []
    for spec, strategy in served.strategies.items():
        speed = Speed(spec, strategy.retention, prompt_tokens, batch, takes_turns=False)
        _run(served, speed, new_tokens, rounds, step_tokens=max(batch * prompt_tokens, prompt_tokens + new_tokens + 1))
        speeds.append(speed)
    return speeds


def largest_batch(
    served: Served, prompt_tokens: int, new_tokens: int, strategy: str, *, limit: int, most: int
) -> LargestBatch:
    """The most sequences whose prompt and continuation stay within a limit, weights and all.

    Raises:
        UserError: the process alone takes more.
    """

    def run(speed: Speed) -> None:
        if device().type == "cpu":
            # Below a limit of the system vLLM's threads would not start, and end the process.
            speed.ran_out_of_memory = _cache_blocks(served, speed, new_tokens).bytes > memory.room_on_cpu(limit)
            if not speed.ran_out_of_memory:
                _run(served, speed, new_tokens, rounds=0, step_tokens=None)
            return
        with memory.limited(device(), limit):
            _run(served, speed, new_tokens, rounds=0, step_tokens=None)

    return search_batch(run, strategy, prompt_tokens, limit=limit, most=most)


def _run(served: Served, speed: Speed, new_tokens: int, rounds: int, step_tokens: int | None) -> None:
    """Start an engine for a case, warm up with it, and note what the rounds take.

    Args:
        step_tokens: that the engine reads at once; None for vLLM's own choice.
    """
    bar = tqdm(range(rounds + 1), desc=f"{speed.strategy}, {speed.batch} x {speed.prompt_tokens:,}", disable=None)
    with ExitStack() as stack:
        started: list[LLM] = []

        def seconds() -> tuple[float, float, int]:
            if not started:  # here, where memory that runs out is noted
                started.append(stack.enter_context(_engine(served, speed, new_tokens, step_tokens)))
            return _seconds(started[0], _prompts(served, speed), new_tokens)

        for number in bar:
            if not speed.ran_out_of_memory:
                note(speed, seconds, device(), counts=number > 0)


class _Cache(NamedTuple):
    """The cache of a case."""

    longest: int
    """Tokens of a sequence."""
    block: int
    """Tokens."""
    bytes: int


def _cache_blocks(served: Served, speed: Speed, new_tokens: int) -> _Cache:
    """As many blocks as a case needs."""
    longest, block = speed.prompt_tokens + new_tokens + 1, _BLOCK[device().type]
    per_token = served.strategies[speed.strategy].cache_bytes_per_token(
        kv_heads=served.kv_heads, head_dim=served.head_dim, bytes_per_element=getattr(torch, served.dtype).itemsize
    )
    return _Cache(longest, block, cache_tokens(longest, speed.batch) * per_token)


def cache_tokens(longest: int, sequences: int = 1) -> int:
    """Tokens of the blocks that sequences of `longest` tokens take, and of the one that vLLM keeps for itself."""
    block = _BLOCK[device().type]
    return (sequences * math.ceil(longest / block) + 1) * block


@contextmanager
def _engine(served: Served, speed: Speed, new_tokens: int, step_tokens: int | None) -> Iterator[LLM]:
    """An engine whose cache holds a case and no more."""
    cache = _cache_blocks(served, speed, new_tokens)
    let_bytes_be_given()
    llm = LLM(
        str(served.folder),
        load_format="auto" if served.has_weights else "dummy",
        skip_tokenizer_init=True,
        dtype=served.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=cache.longest,
        max_num_seqs=speed.batch,
        max_num_batched_tokens=step_tokens,
        block_size=cache.block,
        kv_cache_memory_bytes=cache.bytes,
        kv_sharing_fast_prefill=True,
        hf_overrides={
            "kv_profile": speed.strategy,
            "max_position_embeddings": max(cache.longest, served.positions),
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        memory.give_back(device())


def _prompts(served: Served, speed: Speed) -> list[list[int]]:
    """Always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(served.vocab_size, (speed.batch, speed.prompt_tokens), generator=generator).tolist()


def _seconds(llm: LLM, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
    """Seconds until every sequence has its first token and for those after it; and the cache's bytes per token."""
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens + 1, ignore_eos=True, detokenize=False)
    engine, waiting, first = llm.llm_engine, set(map(str, range(len(prompts)))), 0.0
    started = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            waiting.discard(output.request_id)
        if not waiting and not first:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started - first, _cache_bytes_per_token(llm)


def _cache_bytes_per_token(llm: LLM) -> int:
    """Of the tensors that the engine holds, over the tokens that it has blocks for."""
    cache = llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks is not None
    return int(llm.apply_model(_cache_bytes)[0]) // (cache.num_gpu_blocks * cache.block_size)


def _cache_bytes(model: Any) -> int:
    """Layers that read the cache of another one hold the same tensor."""
    held = {layer.self_attn.attn.kv_cache.data_ptr(): layer.self_attn.attn.kv_cache for layer in model.model.layers}
    return sum(tensor.nbytes for tensor in held.values())
