"""Throughput of vLLM under a fixed budget for the cache: 25 % retention against 100 %, more requests than fit.

    python tools/bench_serve.py exports/mine --json serve.json

The budget holds `--full-requests` requests at full retention; needs vLLM and this package installed beside it. Exit
code 1: the throughput at 25 % is less than `--bound` times that at 100 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from skvr_dist.errors import EXIT_MISSED, UserError, run_command

STRATEGIES = ("full", "every:4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="an export")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--full-requests", type=int, default=8, help="that fit at full retention (default: 8)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="engines of each strategy (default: 3)")
    parser.add_argument("--bound", type=float, default=1.0, help="smallest ratio allowed (default: 1.0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        shape = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        elements = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
        element_bytes = {"float32": 4, "bfloat16": 2}[shape["dtype"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{options.model} is not an export ({error}); give the folder of one") from None
    tokens = options.full_requests * (options.prompt_tokens + options.new_tokens)

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when it is imported
    from skvr_dist.serve.benchmark import measure_throughput

    full, quarter = found = measure_throughput(
        options.model,
        STRATEGIES,
        budget_bytes=tokens * elements * element_bytes,
        requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
    )
    rows = [
        [
            each.strategy,
            f"{each.cache_tokens:,}",
            f"{statistics.median(each.tokens_per_second):,.0f}",
            f"{each.ratio_to(full):.2f}",
        ]
        for each in found
    ]
    header = ["strategy", "tokens in the cache", "generated tokens/s", "of full"]
    print(tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True))
    ratio = quarter.ratio_to(full)
    passed = ratio >= options.bound
    print(
        f"\n{options.requests} requests of {options.prompt_tokens} + {options.new_tokens} tokens, "
        f"{options.full_requests} of which fit at full retention: {ratio:.2f} times the throughput; bound "
        f"{options.bound:.2f}: {'met' if passed else 'missed'}"
    )
    if options.json:
        record = {"throughputs": [asdict(each) for each in found], "ratio": ratio, "bound": options.bound}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


if __name__ == "__main__":
    run_command(main)
