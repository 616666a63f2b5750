"""Time to first token, decoding speed, memory and the largest batch at several cache strategies, lengths and batches.

    skvr-bench generate --json generate.json
    skvr-bench generate --model exports/mine --prompt-tokens 1024 4096 --batch 1 8
    skvr-bench generate --config qwen3-8b --strategies full every:4 --prompt-tokens 8192 --batch 1 2 4 8 --memory-gib 76

With --engine vllm the same is measured of vLLM: an engine for each strategy, length and batch, whose cache holds just
that (`make serve-env` makes an environment with vLLM).

Without --model the model has the shape of --config and random weights: only time and memory matter. On a GPU, in
bfloat16 and with the shape of Qwen3-8B, the figures of the paper's Tables 4 and 5 stand beside ours. With --memory-gib
the largest batch of each strategy is searched, by doubling and then bisecting; on a CPU that is memory of the whole
process. Exit code 1: retaining the first half of the layers (`prefix:L/2`, if it is among the strategies) leaves more
than `--bound` of the time to first token, at the longest prompt and the least batch.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

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
from skvr_dist.commands.bench.generate_tables import largest_table, speed_table
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    import torch

    from skvr_dist.lab.bench.generate import LargestBatch, Speed

HF, VLLM = "hf", "vllm"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--engine", choices=(HF, VLLM), default=HF, help="transformers (default), or vLLM")
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
    with ExitStack() as stack:
        engine = _vllm(options, stack) if options.engine == VLLM else _transformers(options)
        speeds = [
            speed
            for tokens in options.prompt_tokens
            for batch in options.batch
            for speed in engine.measure_speed(tokens, batch)
        ]
        found: list[LargestBatch] = []
        if options.memory_gib is not None:
            limit = int(options.memory_gib * 2**30)
            found = [
                engine.largest_batch(tokens, strategy, limit)
                for tokens in options.prompt_tokens
                for strategy in engine.strategies
            ]
    figures, ratio = _figures(speeds, _half(engine.config), options.bound)
    table = speed_table(speeds, options.new_tokens, engine.is_papers)
    if found:
        table += f"\n\nLargest batch in {options.memory_gib:g} GiB\n\n{largest_table(found, options.most_batch)}"
    record = {"speeds": speeds, "largest_batches": found, "ratio": ratio, "bound": options.bound}
    record |= {"prompt_tokens": options.prompt_tokens, "batch": options.batch, "new_tokens": options.new_tokens}
    record |= {"device": _name_of(engine.device), "dtype": engine.dtype, "memory_gib": options.memory_gib}
    return conclude(figures, table=table, record=record | {"engine": options.engine}, json_file=options.json)


@dataclass(frozen=True)
class Engine:
    """What is measured."""

    config: Any
    """Of the model, as transformers has it."""
    strategies: list[str]
    """Full retention first."""
    device: torch.device
    dtype: str
    measure_speed: Callable[[int, int], list[Speed]]
    """Of every strategy, at a length of the prompt and a batch."""
    largest_batch: Callable[[int, str, int], LargestBatch]
    """At a length of the prompt, a strategy and a limit in bytes."""

    @property
    def is_papers(self) -> bool:
        """Whether the paper's figures are of such a model, dtype and device."""
        from skvr_dist.lab.bench.paper import has_papers_shape

        return self.device.type == "cuda" and self.dtype == "bfloat16" and has_papers_shape(self.config)


def _transformers(options: Namespace) -> Engine:
    """transformers, with the model in this process."""
    from skvr_dist.lab.bench.generate import largest_batch, measure_speed, random_prompt

    device = usable_device(options.device)
    dtype = _dtype(options, device)
    model = _load(options, device, dtype)
    strategies = _strategies(options, model.config)
    for strategy in strategies:  # a mistake in one is met before anything is measured
        model.set_cache_strategy(strategy)
    return Engine(
        model.config,
        strategies,
        model.device,
        dtype,
        lambda tokens, batch: measure_speed(
            model, random_prompt(model, batch, tokens), options.new_tokens, strategies, options.rounds
        ),
        lambda tokens, strategy, limit: largest_batch(
            model, tokens, options.new_tokens, strategy, limit=limit, most=options.most_batch
        ),
    )


def _vllm(options: Namespace, stack: ExitStack) -> Engine:
    """vLLM, with an engine in this process for each case.

    Args:
        stack: ends what is needed until all is measured.

    Raises:
        UserError: vLLM is not installed, or computes elsewhere than asked.
    """
    from skvr_dist.routing import CacheStrategy
    from skvr_dist.serve.server import require_vllm

    require_vllm()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read by vLLM when it is imported
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to the standard output
    from skvr_dist.lab.bench import generate_vllm

    device = generate_vllm.device()
    if options.device not in (None, device.type):
        raise UserError(f"--device {options.device}: vLLM was built for {device.type}; leave the option out")
    dtype = _dtype(options, device.type)
    config, folder = _export_config(options), options.model
    if folder is None:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="skvr-bench-")))
        config = _config_of_shape(options, dtype)
        config.save_pretrained(folder)
    strategies = _strategies(options, config)
    served = generate_vllm.Served(
        folder,
        has_weights=options.model is not None,
        dtype=dtype,
        strategies=CacheStrategy.parse_all(
            strategies, config.num_hidden_layers, getattr(config, "kv_profiles", None) or {}
        ),
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        positions=config.max_position_embeddings,
    )
    return Engine(
        config,
        strategies,
        device,
        dtype,
        lambda tokens, batch: generate_vllm.measure_speed(served, tokens, batch, options.new_tokens, options.rounds),
        lambda tokens, strategy, limit: generate_vllm.largest_batch(
            served, tokens, options.new_tokens, strategy, limit=limit, most=options.most_batch
        ),
    )


def _dtype(options: Namespace, device: str) -> str:
    return str(options.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))


def _half(config: Any) -> str:
    return f"prefix:{max(1, config.num_hidden_layers // 2)}"


def _strategies(options: Namespace, config: Any) -> list[str]:
    return list(dict.fromkeys(["full", *(options.strategies or ["every:2", "every:4", _half(config)])]))


def _figures(speeds: Sequence[Speed], half: str, bound: float) -> tuple[list[Figure], float | None]:
    """The time to first token of half of the depth, at the longest prompt and the least batch."""
    cases = {(speed.strategy, speed.prompt_tokens, speed.batch): speed for speed in speeds}
    tokens = max(speed.prompt_tokens for speed in speeds)
    least = min(speed.batch for speed in speeds)
    if (half, tokens, least) not in cases:
        return [], None
    ratio = cases[half, tokens, least].ratio_to(cases["full", tokens, least], "first_token_seconds")
    shown = "no figure, memory ran out" if ratio is None else f"{ratio:.3f} of full"
    what = f"time to first token of {half} at {tokens} tokens of prompt and a batch of {least}: {shown}"
    return [Figure(what, f"{bound:.2f}", ratio is not None and ratio <= bound)], ratio


def _name_of(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _load(options: Namespace, device: str, dtype: str) -> Any:
    """The export, or a model of the configuration's shape; in evaluation mode, with its whole cache."""
    import torch
    from transformers import AutoModelForCausalLM

    import skvr_dist.hf  # noqa: F401  # with it the Auto classes take kv_profile

    of_dtype = getattr(torch, dtype)
    if options.model:
        _export_config(options)
        with _refusing_damage(options.model):
            model = AutoModelForCausalLM.from_pretrained(options.model, kv_profile="full", dtype=of_dtype)
        return model.to(device).eval()
    config = _config_of_shape(options, dtype)
    config.kv_profile = "full"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=of_dtype).eval()


def _export_config(options: Namespace) -> Any:
    """The configuration of an export; None where there is none to measure."""
    from transformers import AutoConfig

    if options.model is None:
        return None
    if not (options.model / "config.json").exists():
        raise UserError(f"--model {options.model} is not an export: it has no config.json; give the folder of one")
    with _refusing_damage(options.model):
        return AutoConfig.from_pretrained(options.model)


@contextmanager
def _refusing_damage(model: Path) -> Iterator[None]:
    """Name the export that transformers cannot read."""
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {model} cannot be read ({type(error).__name__}: {reason}); export it again") from None


def _config_of_shape(options: Namespace, dtype: str) -> Any:
    """A configuration of the shape of --config, with room for the prompts."""
    import torch

    from skvr_dist.config.load import load_model_config
    from skvr_dist.hf.convert.model_config import hf_config

    positions = max(options.prompt_tokens) + options.new_tokens + 1
    shape = load_model_config(options.config, max_position_embeddings=positions)
    return hf_config(shape, getattr(torch, dtype), {})
