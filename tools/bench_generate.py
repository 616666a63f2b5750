"""Time to first token and decoding speed at 100, 50 and 25 % of the cache and with half the depth retained.

    python tools/bench_generate.py --json generate.json
    python tools/bench_generate.py --model exports/mine --prompt-tokens 1024

Without --model the model has the shape of --config and random weights: only the time matters. Exit code 1: retaining
the first half of the layers leaves more than `--bound` of the time to first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate
from transformers import AutoModelForCausalLM

from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import EXIT_MISSED, UserError, run_command
from skvr_dist.evaluate.retention import percent
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.lab.bench.generate import measure_speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="an export")
    parser.add_argument("--config", type=Path, default=Path("configs/model/tiny.yaml"), metavar="FILE")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10, help="of each strategy (default: 10)")
    parser.add_argument("--bound", type=float, default=0.6, help="largest ratio allowed (default: 0.6)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    model = _load(options)
    half = f"prefix:{model.config.num_hidden_layers // 2}"
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, options.prompt_tokens), generator=generator)
    speeds = measure_speed(model, prompt, options.new_tokens, ["full", "every:2", "every:4", half], options.rounds)
    full = speeds[0]
    rows = [
        [
            speed.strategy,
            percent(speed.retention),
            f"{speed.cache_bytes_per_token:,}",
            f"{1e3 * statistics.median(speed.first_token_seconds):.1f}",
            f"{speed.ratio_to(full, 'first_token_seconds'):.3f}",
            f"{options.new_tokens / statistics.median(speed.decode_seconds):.1f}",
            f"{1 / speed.ratio_to(full, 'decode_seconds'):.3f}",
        ]
        for speed in speeds
    ]
    header = ["strategy", "retention", "cache bytes/token", "first token (ms)", "of full", "tokens/s", "of full"]
    print(tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True))
    ratio = speeds[-1].ratio_to(full, "first_token_seconds")
    passed = ratio <= options.bound
    print(
        f"\ntime to first token of {half} at {options.prompt_tokens} tokens of prompt: {ratio:.3f} of full; bound "
        f"{options.bound:.2f}: {'met' if passed else 'missed'}"
    )
    if options.json:
        record = {"speeds": [asdict(speed) for speed in speeds], "ratio": ratio, "bound": options.bound}
        record |= {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


def _load(options: argparse.Namespace) -> Any:
    if options.model:
        return AutoModelForCausalLM.from_pretrained(options.model, kv_profile="full").eval()
    try:
        section = yaml.safe_load(options.config.read_text(encoding="utf-8"))["model"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read a model section from {options.config} ({error})") from None
    positions = options.prompt_tokens + options.new_tokens + 1
    config = hf_config(ModelConfig(**{**section, "max_position_embeddings": positions}), torch.float32, {})
    config.kv_profile = "full"
    return AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    run_command(main)
