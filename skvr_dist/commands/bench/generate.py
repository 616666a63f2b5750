"""Time to first token and decoding speed at 100, 50 and 25 % of the cache and with half the depth retained.

    skvr-bench generate --json generate.json
    skvr-bench generate --model exports/mine --prompt-tokens 1024

Without --model the model has the shape of --config and random weights: only the time matters. Exit code 1: retaining
the first half of the layers leaves more than `--bound` of the time to first token.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import Figure, a_path, add_bound, add_configs, add_json, at_least, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.bench.generate import Speed


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", metavar="FOLDER", type=a_path, help="an export")
    add_configs(parser, default="tiny")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=2048)
    parser.add_argument("--new-tokens", type=at_least(1), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=10, help="of each strategy (default: 10)")
    add_bound(parser, 0.6, "largest ratio allowed")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure on one process; returns the exit code."""
    import torch

    from skvr_dist.lab.bench.generate import measure_speed

    model = _load(options)
    half = f"prefix:{model.config.num_hidden_layers // 2}"
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, options.prompt_tokens), generator=generator)
    speeds = measure_speed(model, prompt, options.new_tokens, ["full", "every:2", "every:4", half], options.rounds)
    ratio = speeds[-1].ratio_to(speeds[0], "first_token_seconds")
    figure = Figure(
        f"time to first token of {half} at {options.prompt_tokens} tokens of prompt: {ratio:.3f} of full",
        f"{options.bound:.2f}",
        ratio <= options.bound,
    )
    record = {"speeds": speeds, "ratio": ratio, "bound": options.bound}
    record |= {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    return conclude([figure], table=_table(speeds, options.new_tokens), record=record, json_file=options.json)


def _table(speeds: Sequence[Speed], new_tokens: int) -> str:
    from skvr_dist.evaluate.retention import percent

    full = speeds[0]
    rows = [
        [
            speed.strategy,
            percent(speed.retention),
            f"{speed.cache_bytes_per_token:,}",
            f"{1e3 * statistics.median(speed.first_token_seconds):.1f}",
            f"{speed.ratio_to(full, 'first_token_seconds'):.3f}",
            f"{new_tokens / statistics.median(speed.decode_seconds):.1f}",
            f"{1 / speed.ratio_to(full, 'decode_seconds'):.3f}",
        ]
        for speed in speeds
    ]
    header = ["strategy", "retention", "cache bytes/token", "first token (ms)", "of full", "tokens/s", "of full"]
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def _load(options: Namespace) -> Any:
    """The export, or a model of the configuration's shape; in evaluation mode, with its whole cache."""
    import torch
    import yaml
    from pydantic import ValidationError
    from transformers import AutoModelForCausalLM

    from skvr_dist.config.model import ModelConfig
    from skvr_dist.hf.convert.model_config import hf_config
    from skvr_dist.section import in_words

    if options.model:
        if not (options.model / "config.json").exists():
            raise UserError(f"--model {options.model} is not an export: it has no config.json; give the folder of one")
        return AutoModelForCausalLM.from_pretrained(options.model, kv_profile="full").eval()
    file = options.config[-1]
    positions = options.prompt_tokens + options.new_tokens + 1
    try:
        section = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        model_config = ModelConfig(**{**section, "max_position_embeddings": positions})
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = in_words(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise UserError(f"cannot read a model section from {file} ({reason})") from None
    config = hf_config(model_config, torch.float32, {})
    config.kv_profile = "full"
    return AutoModelForCausalLM.from_config(config).eval()
