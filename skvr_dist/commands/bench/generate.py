"""Time to first token, decoding speed, memory and the largest batch at several cache strategies, lengths and batches.

    skvr-bench generate --json generate.json
    skvr-bench generate --model exports/mine --prompt-tokens 1024 4096 --batch 1 8
    skvr-bench generate --config qwen3-8b --strategies full every:4 --prompt-tokens 8192 --batch 1 2 4 8 --memory-gib 76

Without --model the model has the shape of --config and random weights: only time and memory matter. On a GPU, in
bfloat16 and with the shape of Qwen3-8B, the figures of the paper's Tables 4 and 5 stand beside ours. With --memory-gib
the largest batch of each strategy is searched, by doubling and then bisecting; on a CPU that is memory of the whole
process. Exit code 1: retaining the first half of the layers (`prefix:L/2`, if it is among the strategies) leaves more
than `--bound` of the time to first token, at the longest prompt and the least batch.
"""

from __future__ import annotations

import math
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import (
    Figure,
    a_path,
    add_bound,
    add_configs,
    add_json,
    at_least,
    conclude,
    positive,
    usable_device,
)
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.bench.generate import LargestBatch, Speed

_MB = 10**6


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", metavar="FOLDER", type=a_path, help="an export")
    add_configs(parser, default="tiny")
    parser.add_argument("--strategies", nargs="+", metavar="S", help="default: full, every:2, every:4, prefix:L/2")
    parser.add_argument("--prompt-tokens", nargs="+", type=at_least(1), default=[2048], metavar="N")
    parser.add_argument("--batch", nargs="+", type=at_least(1), default=[1], metavar="N", help="sequences at once")
    parser.add_argument("--new-tokens", type=at_least(1), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=10, help="of each strategy (default: 10)")
    parser.add_argument("--memory-gib", type=positive, metavar="X", help="search the largest batch in so much memory")
    parser.add_argument("--most-batch", type=at_least(1), default=1024, metavar="N", help="of that search (1024)")
    parser.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    add_bound(parser, 0.6, "largest ratio allowed")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure on one process; returns the exit code."""
    from skvr_dist.lab.bench.generate import largest_batch, measure_speed, random_prompt

    device = usable_device(options.device)
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model = _load(options, device, dtype)
    half = f"prefix:{max(1, model.config.num_hidden_layers // 2)}"
    strategies = list(dict.fromkeys(["full", *(options.strategies or ["every:2", "every:4", half])]))
    for strategy in strategies:  # a mistake in one is met before anything is measured
        model.set_cache_strategy(strategy)
    speeds: list[Speed] = []
    for tokens in options.prompt_tokens:
        for batch in options.batch:
            prompt = random_prompt(model, batch, tokens)
            speeds += measure_speed(model, prompt, options.new_tokens, strategies, options.rounds)
    found: list[LargestBatch] = []
    if options.memory_gib is not None:
        limit = int(options.memory_gib * 2**30)
        found = [
            largest_batch(model, tokens, options.new_tokens, strategy, limit=limit, most=options.most_batch)
            for tokens in options.prompt_tokens
            for strategy in strategies
        ]
    figures, ratio = _figures(speeds, half, options.bound)
    beside_paper = device.startswith("cuda") and dtype == "bfloat16" and _has_papers_shape(model)
    table = _table(speeds, options.new_tokens, beside_paper)
    if found:
        table += f"\n\nLargest batch in {options.memory_gib:g} GiB\n\n{_largest_table(found, options.most_batch)}"
    record = {"speeds": speeds, "largest_batches": found, "ratio": ratio, "bound": options.bound}
    record |= {"prompt_tokens": options.prompt_tokens, "batch": options.batch, "new_tokens": options.new_tokens}
    record |= {"device": _name_of(device), "dtype": dtype, "memory_gib": options.memory_gib}
    return conclude(figures, table=table, record=record, json_file=options.json)


def _figures(speeds: Sequence[Speed], half: str, bound: float) -> tuple[list[Figure], float | None]:
    """The time to first token of half of the depth, at the longest prompt and the least batch."""
    cases = {(speed.strategy, speed.prompt_tokens, speed.batch): speed for speed in speeds}
    tokens = max(speed.prompt_tokens for speed in speeds)
    least = min(speed.batch for speed in speeds)
    if (half, tokens, least) not in cases:
        return [], None
    ratio = cases[half, tokens, least].ratio_to(cases["full", tokens, least], "first_token_seconds")
    shown = "no figure, memory ran out" if ratio is None else f"{ratio:.3f} of full"
    what = f"time to first token of {half} at {tokens} tokens of prompt: {shown}"
    return [Figure(what, f"{bound:.2f}", ratio is not None and ratio <= bound)], ratio


def _table(speeds: Sequence[Speed], new_tokens: int, beside_paper: bool) -> str:
    """A row for each strategy, length and batch; the paper's figures behind ours."""
    full = {(speed.prompt_tokens, speed.batch): speed for speed in speeds if speed.strategy == "full"}
    rows = []
    for speed in speeds:
        row = _row(speed, full[speed.prompt_tokens, speed.batch], new_tokens)
        rows.append([*row, *_papers(speed)] if beside_paper else row)
    header = [
        "prompt",
        "batch",
        "strategy",
        "retention",
        "cache bytes/token",
        "cache (MB)",
        "first token (ms)",
        "of full",
    ]
    header += ["tokens/s each", "of full", "peak (MB)"]
    if beside_paper:
        header += ["paper: cache (MB)", "first token (ms)", "tokens/s each", "peak (MB)"]
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def _row(speed: Speed, full: Speed, new_tokens: int) -> list[str]:
    from skvr_dist.evaluate.retention import percent

    row = [f"{speed.prompt_tokens:,}", f"{speed.batch}", speed.strategy, percent(speed.retention)]
    if speed.ran_out_of_memory:
        return [*row, *[""] * 6, "out of memory"]
    first, decode = (statistics.median(each) for each in (speed.first_token_seconds, speed.decode_seconds))
    cache = speed.cache_bytes_per_token * speed.prompt_tokens * speed.batch / _MB
    row += [f"{speed.cache_bytes_per_token:,}", f"{cache:,.1f}"]
    row += [f"{1e3 * first:.1f}", _ratio(speed.ratio_to(full, "first_token_seconds"))]
    slower = speed.ratio_to(full, "decode_seconds")
    row += [f"{new_tokens / decode:.1f}", _ratio(None if slower is None else 1 / slower)]
    return [*row, _megabytes(speed.peak_bytes)]


def _papers(speed: Speed) -> list[str]:
    """The paper's cache, time to first token, tokens per second and peak for a case."""
    from skvr_dist.lab.bench.paper import OUT_OF_MEMORY, paper_row

    case = (speed.strategy, speed.prompt_tokens, speed.batch)
    if case == OUT_OF_MEMORY:
        return ["", "", "", "out of memory"]
    row = paper_row(*case)
    if row is None:
        return [""] * 4
    shown = (row.cache_mb, row.first_token_ms, row.tokens_per_second, row.peak_mb)
    return ["" if figure is None else f"{figure:,g}" for figure in shown]


def _largest_table(found: Sequence[LargestBatch], most: int) -> str:
    full = {each.prompt_tokens: each.batch for each in found if each.strategy == "full"}
    rows = [
        [
            f"{each.prompt_tokens:,}",
            each.strategy,
            f"{each.batch}" + (" or more" if each.batch == most else ""),
            _ratio(each.batch / full[each.prompt_tokens] if full[each.prompt_tokens] else None),
            _megabytes(each.peak_bytes),
        ]
        for each in found
    ]
    header = ["prompt", "strategy", "largest batch", "of full", "peak (MB)"]
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None or not math.isfinite(ratio) else f"{ratio:.3f}"


def _megabytes(size: int | None) -> str:
    return "n/a" if size is None else f"{size / _MB:,.0f}"


def _has_papers_shape(model: Any) -> bool:
    from skvr_dist.lab.bench.paper import has_papers_shape

    return has_papers_shape(model.config)


def _name_of(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _load(options: Namespace, device: str, dtype: str) -> Any:
    """The export, or a model of the configuration's shape; in evaluation mode, with its whole cache."""
    import torch
    import yaml
    from pydantic import ValidationError
    from transformers import AutoModelForCausalLM

    from skvr_dist.config.model import ModelConfig
    from skvr_dist.hf.convert.model_config import hf_config
    from skvr_dist.section import in_words

    of_dtype = getattr(torch, dtype)
    if options.model:
        if not (options.model / "config.json").exists():
            raise UserError(f"--model {options.model} is not an export: it has no config.json; give the folder of one")
        model = AutoModelForCausalLM.from_pretrained(options.model, kv_profile="full", dtype=of_dtype)
        return model.to(device).eval()
    file = options.config[-1]
    positions = max(options.prompt_tokens) + options.new_tokens + 1
    try:
        section = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        model_config = ModelConfig(**{**section, "max_position_embeddings": positions})
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = in_words(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise UserError(f"cannot read a model section from {file} ({reason})") from None
    config = hf_config(model_config, of_dtype, {})
    config.kv_profile = "full"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=of_dtype).eval()
