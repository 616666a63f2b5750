"""What serving takes: which cache strategies fit on a GPU, with how many sequences, and when a second engine pays.

    skvr-estimate serve exports/routed --memory-gib 80 --context 8192
    skvr-estimate serve qwen3-8b --memory-gib 80 --context 32768 --strategies full every:2 every:4 --sequences 16

MODEL is an export, a checkpoint or a run, or a model's preset. Without --strategies: full retention and the profiles
that it carries, or every:2 and every:4. Then one engine at the first strategy is compared with two side by side on the
same GPU, the second one at the last strategy. Exit code 1: no strategy holds --sequences at once (default: one).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, at_least, at_least_zero, conclude, positive, share
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.config.model import ModelConfig
    from skvr_dist.lab.estimate.serve import BreakEven, Fit

_GIB = 2**30
UTILIZATION, OTHER_GIB, BLOCK = 0.9, 2.0, 16
"""What is assumed of an engine where nobody says otherwise: `--utilization`, `--other-gib` and `--block`."""
_TYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--memory-gib", type=positive, required=True, metavar="X", help="of the GPU")
    parser.add_argument("--context", type=at_least(1, 10**9), required=True, metavar="N", help="tokens of a sequence")
    parser.add_argument("--sequences", type=at_least(1), metavar="N", help="that must fit at once")
    parser.add_argument("--strategies", nargs="+", metavar="S", help="strategies or profiles")
    parser.add_argument("--dtype", choices=_TYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--cache-dtype", choices=(*_TYPES, "fp8", "int8"), help="of the cache (default: --dtype)")
    parser.add_argument("--utilization", type=share, default=UTILIZATION, metavar="X", help="share of the memory that "
                        "the engine may use, as vLLM's gpu_memory_utilization (default: 0.9)")  # fmt: skip
    parser.add_argument("--other-gib", type=at_least_zero, default=OTHER_GIB, metavar="X", help="what the engine takes "
                        "beside weights and cache; vLLM logs it when it starts (default: 2)")  # fmt: skip
    parser.add_argument("--block", type=at_least(1), default=BLOCK, help="tokens of a block of the cache (default: 16)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Estimate and print; returns the exit code."""
    from skvr_dist.lab.estimate.serve import BYTES, Server, break_even, fit_strategies
    from skvr_dist.routing import CacheStrategy

    model, profiles = _model(options.model)
    server = Server(
        memory=int(options.memory_gib * options.utilization * _GIB),
        other=int(options.other_gib * _GIB),
        context=options.context,
        weight_bytes=BYTES[options.dtype],
        cache_bytes=BYTES[options.cache_dtype or options.dtype],
        block=options.block,
    )
    specs = options.strategies or ["full", *(profiles or ("every:2", "every:4"))]
    strategies = CacheStrategy.parse_all(specs, model.num_hidden_layers, profiles)
    fits = fit_strategies(model, server, strategies)
    pair = break_even(server, fits[0], fits[-1]) if len(fits) > 1 and fits[0].sequences else None
    most = max(fits, key=lambda fit: fit.sequences)
    held = f"{most.name} holds {most.sequences:,} sequences of {options.context:,} tokens at once"
    wanted = options.sequences or 1
    figures = [Figure(held, f">= {wanted:,}", most.sequences >= wanted)]
    both = pair and {"first": pair.best.name, "second": pair.bulk.name, "share": pair.share}
    record = {
        "server": asdict(server),
        "strategies": [asdict(fit) | {"kv_source_layers": fit.strategy.kv_source_layers} for fit in fits],
        "break_even": both,
    }
    table = _table(fits, options.sequences, options.other_gib) + (f"\n\n{_in_words(pair)}" if pair else "")
    return conclude(figures, table=table, record=record, json_file=options.json)


def _model(text: str) -> tuple[ModelConfig, dict[str, str]]:
    """The shape of a model and its profiles: of an export, of a checkpoint, or of a preset by name."""
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.config.load import read_tree
    from skvr_dist.config.model import ModelConfig
    from skvr_dist.config.presets import find_config
    from skvr_dist.files import local_path
    from skvr_dist.hf.convert.source_folder import SourceFolder

    folder = local_path(text)
    if not folder.is_dir():
        tree = read_tree(find_config(text))
        if "model" not in tree:
            raise UserError(f"configuration {text} has no model section; name one of a model, such as qwen3-8b")
        return ModelConfig.model_validate(tree["model"]), {}
    if (folder / "config.json").exists():
        source = SourceFolder(folder)
        return source.config, dict(getattr(source.published, "kv_profiles", None) or {})
    checkpoint = Checkpoint(folder)
    return checkpoint.model_config, dict(checkpoint.config.evaluate.profiles)


def _table(fits: list[Fit], wanted: int | None, other: float) -> str:
    rows = []
    for fit in fits:
        row = [
            fit.name,
            f"{len(fit.strategy.retained)} of {fit.strategy.num_layers}",
            f"{fit.weights / _GIB:.2f}",
            f"{fit.cache_bytes_per_token:,}",
            f"{fit.tokens:,}" if fit.tokens >= 0 else f"weights and {other:g} GiB beside do not fit",
            f"{fit.sequences:,}",
        ]
        rows.append(row if wanted is None else [*row, "yes" if fit.sequences >= wanted else "no"])
    headers = [
        "strategy",
        "layers with a cache",
        "weights GiB",
        "cache bytes/token",
        "tokens in the cache",
        "sequences",
    ]
    headers += [] if wanted is None else [f"holds {wanted}"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _in_words(pair: BreakEven) -> str:
    both = f"one engine at {pair.best.name} against two on this GPU, the second at {pair.bulk.name}"
    if pair.share is None:
        return f"{both}: one holds more, for what the second takes beside its cache is more than it saves"
    if pair.share >= 1:
        return f"{both}: two hold more, whatever the mix"
    return (
        f"{both}: two hold more sequences while at most {pair.share:.1%} of the requests need {pair.best.name}; one at "
        f"{pair.bulk.name} for all holds the most"
    )
