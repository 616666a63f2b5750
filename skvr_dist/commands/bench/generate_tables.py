"""The tables of `skvr-bench generate`, the same for every engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from skvr_dist.lab.bench.generate import LargestBatch, Speed

_MB = 10**6


def speed_table(speeds: Sequence[Speed], new_tokens: int, beside_paper: bool) -> str:
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


def largest_table(found: Sequence[LargestBatch], most: int) -> str:
    """A row for each strategy and length.

    Args:
        most: the batch at which the search ended.
    """
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
