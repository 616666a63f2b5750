"""vLLM under a fixed budget for the cache: throughput with more requests than fit, and time to first token.

    skvr-bench serve exports/mine --json serve.json

At full retention, every 4th layer, and the first half of the layers. The budget holds `--full-requests` requests at
full retention; needs vLLM and this package installed beside it. Exit code 1: the throughput with every 4th layer is
less than `--bound` times that at full retention, or the first token with the first half of the layers takes more than
`--first-token-bound` times as long.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import Figure, a_path, add_bound, add_json, at_least, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.bench.serve import Serving

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", type=a_path, help="an export")
    parser.add_argument("--requests", type=at_least(1), default=64)
    parser.add_argument(
        "--full-requests", type=at_least(1), default=10, help="that fit at full retention (default: 10)"
    )
    parser.add_argument("--prompt-tokens", type=at_least(1), default=128)
    parser.add_argument("--new-tokens", type=at_least(1), default=128)
    parser.add_argument(
        "--long-prompt-tokens", type=at_least(1), default=2000, help="for the first token (default: 2000)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="engines of each strategy (default: 3)")
    add_bound(parser, 1.0, "smallest ratio of throughputs")
    add_bound(parser, 0.7, "largest ratio of times to first token", "--first-token-bound")
    add_json(parser)


def run(options: Namespace) -> int:
    """Serve and measure; returns the exit code."""
    if find_spec("vllm") is None:
        raise UserError(
            "this measures vLLM, which is not installed here; `make serve-env` makes an environment with it"
        )
    shape = _shape(options.model)
    layers = shape["num_hidden_layers"]
    elements = 2 * layers * shape["num_key_value_heads"] * _head_size(shape)
    tokens = options.full_requests * (options.prompt_tokens + options.new_tokens)

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when it is imported
    from skvr_dist.lab.bench.generate_vllm import cache_tokens
    from skvr_dist.lab.bench.serve import Load, measure_serving

    load = Load(options.requests, options.prompt_tokens, options.new_tokens, options.long_prompt_tokens)
    _require_room(options, tokens, cache_tokens(load.longest))
    full, quarter, half = found = measure_serving(
        options.model,
        ("full", "every:4", f"prefix:{max(1, layers // 2)}"),
        load,
        positions=shape["max_position_embeddings"],
        dtype=shape["dtype"],
        budget_bytes=tokens * elements * ELEMENT_BYTES[shape["dtype"]],
        rounds=options.rounds,
    )
    ratio, first_token = quarter.ratio_to(full, "tokens_per_second"), half.ratio_to(full, "first_token_seconds")
    figures = [
        Figure(
            f"{options.requests} requests of {options.prompt_tokens} + {options.new_tokens} tokens, "
            f"{options.full_requests} of which fit at full retention, with {quarter.strategy}: {ratio:.2f} times the "
            f"throughput",
            f"{options.bound:.2f}",
            ratio >= options.bound,
        ),
        Figure(
            f"time to first token of {half.strategy} at {options.long_prompt_tokens} tokens of prompt: "
            f"{first_token:.3f} of full",
            f"{options.first_token_bound:.2f}",
            first_token <= options.first_token_bound,
        ),
    ]
    record = {"servings": found, "ratio": ratio, "bound": options.bound}
    record |= {"first_token_ratio": first_token, "first_token_bound": options.first_token_bound}
    return conclude(figures, table=_table(found), record=record, json_file=options.json)


def _require_room(options: Namespace, tokens: int, needed: int) -> None:
    """Raises `UserError` if a cache of so many tokens is too small for the longest sequence alone."""
    each = options.prompt_tokens + options.new_tokens
    if tokens < needed:
        raise UserError(
            f"--full-requests {options.full_requests} of {each} tokens make a cache of {tokens:,} tokens, but the "
            f"longest sequence takes {needed:,}; ask for --full-requests {math.ceil(needed / each)}, or for fewer "
            f"--long-prompt-tokens than {options.long_prompt_tokens}"
        )


def _shape(model: Path) -> dict[str, Any]:
    """The `config.json` of an export, with all that the budget is counted from."""
    try:
        shape: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
        _ = [shape[name] for name in ("num_hidden_layers", "num_key_value_heads", "max_position_embeddings")]
        _ = _head_size(shape), ELEMENT_BYTES[shape["dtype"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model} is not an export ({error}); give the folder of one") from None
    return shape


def _head_size(shape: dict[str, Any]) -> int:
    """Of an export's configuration; transformers writes none for Qwen2, whose heads share the hidden size."""
    return shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]


def _table(found: Sequence[Serving]) -> str:
    full = found[0]
    rows = [
        [
            each.strategy,
            f"{each.cache_tokens:,}",
            f"{statistics.median(each.tokens_per_second):,.0f}",
            f"{each.ratio_to(full, 'tokens_per_second'):.2f}",
            f"{1e3 * statistics.median(each.first_token_seconds):.1f}",
            f"{each.ratio_to(full, 'first_token_seconds'):.3f}",
        ]
        for each in found
    ]
    header = ["strategy", "tokens in the cache", "generated tokens/s", "of full", "first token (ms)", "of full"]
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)
