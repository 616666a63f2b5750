"""The part of `skvr-retention` that combines cache strategies with quantized caches and sliding windows."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import Figure, at_least, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.evaluate.combined import CombinedPoint


def add_combinations(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    group = parser.add_argument_group("combinations, of an export")
    group.add_argument("--bits", nargs="+", type=int, choices=(16, 8, 4), help="of cached elements (16: bf16)")
    group.add_argument("--windows", nargs="+", type=_window, metavar="N", help="tokens that are kept, or none: all")
    group.add_argument(
        "--recent", type=at_least(1), default=32, metavar="N", help="tokens between two quantizations (default: 32)"
    )


def measure_combinations(options: argparse.Namespace, checkpoint: Checkpoint, names: Sequence[str], device: str) -> int:
    """Measure and print every combination; returns the exit code.

    Args:
        names: of strategies and profiles.

    Raises:
        UserError: the model is no export, or a gate is on what is not measured.
    """
    from skvr_dist.evaluate.combined import FULL_BITS, combined_curve
    from skvr_dist.evaluate.curve import HeldOutData
    from skvr_dist.evaluate.outputs import FULL
    from skvr_dist.routing import CacheStrategy

    held_out = HeldOutData.of(checkpoint, options.data, options.sequence_length, options.documents)
    held_out.require_fits(checkpoint)
    if options.png:
        raise UserError(f"--png {options.png}: combinations are a table only; leave out --png, or --bits and --windows")
    names = list(dict.fromkeys([FULL, *names]))
    bits = list(dict.fromkeys([FULL_BITS, *(options.bits or ())]))
    length = held_out.sequence_length
    if min(bits) < FULL_BITS and options.recent >= length:
        raise UserError(
            f"--recent {options.recent} quantizes nothing of sequences of {length} tokens before it is read last; give "
            f"a smaller one, or a larger --sequence-length"
        )
    windows = list(dict.fromkeys([None, *(options.windows or ())]))
    _require_measured(options.gate, [label(*each) for each in product(names, bits, windows)])
    layers, profiles = checkpoint.model_config.num_hidden_layers, checkpoint.config.evaluate.profiles
    model = _load(checkpoint, device)
    points = combined_curve(
        model,
        held_out.batches(options.sequences, options.batch_size, device),
        CacheStrategy.parse_all(names, layers, profiles),
        bits=bits,
        windows=windows,
        recent=options.recent,
    )
    record = {
        "model": str(checkpoint.folder),
        "data": held_out.location,
        "data_fingerprint": held_out.fingerprint,
        "sequence_length": length,
        "recent": options.recent,
        "points": points,
    }
    figures = _figures({label(p.strategy, p.bits, p.window): p for p in points}, options.gate)
    table = f"{_table(points)}\n\n{_about_bytes(points, length % options.recent)}"
    return conclude(figures, table=table, record=record, json_file=options.json)


def label(strategy: str, bits: int, window: int | None) -> str:
    """A combination as a gate names it: every:2+int4+window:64, and every:2 alone for bf16 without a window."""
    parts = [f"int{bits}"] if bits < 16 else []
    parts += [f"window:{window}"] if window is not None else []
    return "+".join([strategy, *parts])


def _require_measured(gates: Sequence[tuple[str, float]], labels: Sequence[str]) -> None:
    if unknown := next((name for name, _ in gates if name not in labels), None):
        raise UserError(f"--gate {unknown} is on no combination that is measured; name one of {', '.join(labels)}")


def _load(checkpoint: Checkpoint, device: str) -> Any:
    """The export as transformers runs it with our classes, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from skvr_dist.hf.convert.opened import OpenedFolder

    if not isinstance(checkpoint, OpenedFolder):
        raise UserError(
            f"--bits and --windows measure transformers' caches, and {checkpoint.folder} is no export; give the folder "
            f"that tools/export_hf.py makes of it"
        )
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, kv_profile="full", dtype=torch.float32, attn_implementation="sdpa"
    )
    return loaded.to(device).eval()


def _table(points: Sequence[CombinedPoint]) -> str:
    from skvr_dist.evaluate.retention import percent

    full = points[0]
    rows = []
    for point in points:
        mean, low, high = point.rise
        rows.append(
            [
                point.strategy,
                "bf16" if point.bits == full.bits else f"int{point.bits}",
                "none" if point.window is None else f"{point.window:,}",
                f"{point.held_bytes:,.0f}",
                percent(point.held_bytes / full.held_bytes),
                f"{point.counted_bytes:,.0f}",
                f"{point.loss:.4f}",
                "" if point is full else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})",
            ]
        )
    headers = ["strategy", "cache", "window", "bytes/token held", "of full", "counted", "loss", "rise (95 %)"]
    return tabulate(rows, headers=headers, tablefmt="github", stralign="right", disable_numparse=True)


def _about_bytes(points: Sequence[CombinedPoint], unquantized: int) -> str:
    """Where the bytes that are held are not those that an engine counts.

    Args:
        unquantized: tokens at the end of a sequence that wait for the next quantization.
    """
    factors: dict[int, float] = {}
    for point in points:
        factors[point.bits] = max(factors.get(point.bits, 0.0), point.held_bytes / point.counted_bytes)
    more = [f"int{bits} caches hold {factor:.3f} times" for bits, factor in factors.items() if factor > 1.0005]
    if not more:
        return "Every cache holds the bytes that tools/estimate.py serve counts."
    what, at_most = "Scales and zero points", ""
    if unquantized:
        what, at_most = f"{what}, and the last {unquantized} tokens, which are not quantized yet,", "at most "
    return f"{what} come on top: {at_most}{', '.join(more)} the bytes that tools/estimate.py serve counts."


def _figures(points: Mapping[str, CombinedPoint], gates: Sequence[tuple[str, float]]) -> list[Figure]:
    return [
        Figure(
            f"{name} costs {points[name].rise.mean:+.4f} nats per token",
            f"<= {most:+.4f}",
            points[name].rise.mean <= most,
        )
        for name, most in gates
    ]


def _window(text: str) -> int | None:
    """An argparse type: tokens, or none."""
    return None if text == "none" else at_least(1)(text)
