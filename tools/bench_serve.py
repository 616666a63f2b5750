"""vLLM under a fixed budget for the cache: throughput with more requests than fit, and time to first token.

    python tools/bench_serve.py exports/mine --json serve.json

At full retention, every 4th layer, and the first half of the layers. The budget holds `--full-requests` requests at
full retention; needs vLLM and this package installed beside it. Exit code 1: the throughput with every 4th layer is
less than `--bound` times that at full retention, or the first token with the first half of the layers takes more than
`--first-token-bound` times as long.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path, help="an export")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--full-requests", type=int, default=10, help="that fit at full retention (default: 10)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long-prompt-tokens", type=int, default=2000, help="for the first token (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="engines of each strategy (default: 3)")
    parser.add_argument("--bound", type=float, default=1.0, help="smallest ratio of throughputs (default: 1.0)")
    parser.add_argument(
        "--first-token-bound", type=float, default=0.7, help="largest ratio of times to first token (default: 0.7)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    try:
        shape = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        layers = shape["num_hidden_layers"]
        elements = 2 * layers * shape["num_key_value_heads"] * shape["head_dim"]
        element_bytes = {"float32": 4, "bfloat16": 2}[shape["dtype"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{options.model} is not an export ({error}); give the folder of one") from None
    tokens = options.full_requests * (options.prompt_tokens + options.new_tokens)

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when it is imported
    from skvr_dist.lab.bench.serve import Load, measure_serving

    full, quarter, half = found = measure_serving(
        options.model,
        ("full", "every:4", f"prefix:{layers // 2}"),
        Load(options.requests, options.prompt_tokens, options.new_tokens, options.long_prompt_tokens),
        dtype=shape["dtype"],
        budget_bytes=tokens * elements * element_bytes,
        rounds=options.rounds,
    )
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
    print(tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True))
    ratio, first_token = quarter.ratio_to(full, "tokens_per_second"), half.ratio_to(full, "first_token_seconds")
    passed = ratio >= options.bound, first_token <= options.first_token_bound
    verdict = ["met" if each else "missed" for each in passed]
    print(
        f"\n{options.requests} requests of {options.prompt_tokens} + {options.new_tokens} tokens, "
        f"{options.full_requests} of which fit at full retention, with {quarter.strategy}: {ratio:.2f} times the "
        f"throughput; bound {options.bound:.2f}: {verdict[0]}\n"
        f"time to first token of {half.strategy} at {options.long_prompt_tokens} tokens of prompt: {first_token:.3f} "
        f"of full; bound {options.first_token_bound:.2f}: {verdict[1]}"
    )
    if options.json:
        record = {"servings": [asdict(each) for each in found], "ratio": ratio, "bound": options.bound}
        record |= {"first_token_ratio": first_token, "first_token_bound": options.first_token_bound}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(passed) else EXIT_MISSED


if __name__ == "__main__":
    run_command(main)
