"""Retention curve of a checkpoint: loss for a list of cache strategies, as a table, JSON and a picture.

    skvr-retention runs/quickstart/routed --strategies full every:2 every:4
    skvr-retention runs/quickstart/routed --families even prefix suffix sandwich
    skvr-retention runs/quickstart/routed --gate every:2=0.05 --gate every:4=0.2
    skvr-retention exports/routed --data data/stdlib/validation --sequence-length 256 --bits 8 4 --windows 64 128

MODEL is a checkpoint's folder, or a run's, which stands for its latest checkpoint, or an export. Imports and exports
have no held-out data of their own: give it with --data, and sequences of another length than 1024 with
--sequence-length; --documents measures a model with joined or separate documents, whatever it was trained with. With
--gate STRATEGY=NATS the exit code is 1 if that strategy costs more than so many nats per token
over full retention. With --bits or --windows every strategy of an export is measured with caches of these forms too, by
the caches of transformers; a gate then names a combination, such as every:2+int4+window:64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from fractions import Fraction

from skvr_dist.command import (
    Figure,
    a_path,
    add_json,
    at_least,
    exit_code_of,
    new_parser,
    parse,
    run_command,
    usable_device,
    write_json,
)
from skvr_dist.commands.combined_caches import add_combinations, measure_combinations
from skvr_dist.errors import UserError
from skvr_dist.files import is_stream, prove_writable

FAMILIES = ("even", "prefix", "suffix", "sandwich")
_SHARES = tuple(Fraction(1, part) for part in (2, 3, 4, 8))


def main() -> None:
    """Entry point."""
    run_command(run)


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", metavar="MODEL", type=a_path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--strategies", nargs="+", metavar="S", help="cache strategies (default: five)")
    which.add_argument(
        "--families", nargs="+", choices=FAMILIES, help="full retention, and of each family 1/2, 1/3, 1/4 and 1/8"
    )
    parser.add_argument(
        "--sequences",
        type=at_least(1, 10**7),
        metavar="N",
        help="held-out sequences (default: 256, or as many as there are)",
    )
    parser.add_argument("--data", metavar="FOLDER", help="another held-out data set than the run's")
    parser.add_argument(
        "--sequence-length", type=at_least(1, 10**8), metavar="N", help="tokens per sequence (default: the run's)"
    )
    parser.add_argument(
        "--documents",
        choices=("joined", "separate"),
        help="whether attention runs on across documents (default: as the run's)",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--device", help="where to compute (default: a GPU if there is one)")
    parser.add_argument(
        "--gate",
        action="append",
        type=_gate,
        default=[],
        metavar="S=NATS",
        help="most that a strategy or profile may cost",
    )
    add_combinations(parser)
    add_json(parser, "default: retention.json in the model's folder")
    parser.add_argument("--png", type=a_path, metavar="FILE", help="default: beside the JSON")
    return parse(parser)


def run() -> int:
    """Measure the curve, write and print it; returns the exit code."""
    options = _options()

    from skvr_dist.evaluate.curve import HeldOutData, evaluate_checkpoint
    from skvr_dist.evaluate.retention import RETENTION_FILE, as_table, plot
    from skvr_dist.hf.convert.opened import open_model

    device = usable_device(options.device)
    checkpoint = open_model(options.checkpoint)
    strategies = options.strategies or of_families(options.families or (), checkpoint.model_config.num_hidden_layers)
    if options.bits or options.windows:
        return measure_combinations(options, checkpoint, strategies, device)
    others = [name for name in ("data", "sequence_length", "documents") if getattr(options, name)]
    if others and checkpoint.is_trained and not options.json:
        option = f"--{others[0].replace('_', '-')}"
        raise UserError(f"{option} needs --json: the checkpoint keeps the curve over its own held-out data")
    json_file = prove_writable(options.json or checkpoint.folder / RETENTION_FILE)
    beside = None if is_stream(json_file) else json_file.with_suffix(".png")
    png = options.png or beside
    png_file = None if png is None else prove_writable(png)
    if options.gate:  # rises are over the first one
        strategies = list(dict.fromkeys(["full", *strategies, *(name for name, _ in options.gate)]))
    measurement = evaluate_checkpoint(
        checkpoint,
        HeldOutData.of(checkpoint, options.data, options.sequence_length, options.documents),
        strategies,
        sequences=options.sequences,
        batch_size=options.batch_size,
        device=device,
    )
    curves = {f"step {checkpoint.step}": measurement.points}
    record = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, **measurement.record()}
    write_json(json_file, record)
    if png_file is not None:
        plot(curves, png_file)
    print(as_table(curves))
    print(
        f"over {measurement.tokens:,} tokens: {measurement.sequences} sequences of {measurement.sequence_length} from "
        f"{measurement.data} ({measurement.data_fingerprint}), documents {measurement.documents}"
    )
    print(f"written: {json_file}{f', {png_file}' if png_file else ''}")
    rises = {point.strategy: point.loss - measurement.points[0].loss for point in measurement.points}
    figures = [
        Figure(f"{name} costs {rises[name]:+.4f} nats per token", f"<= {most:+.4f}", rises[name] <= most)
        for name, most in options.gate
    ]
    for figure in figures:
        print(figure)
    return exit_code_of(figures)


def _gate(text: str) -> tuple[str, float]:
    """An argparse type: a strategy or profile and the most that it may cost."""
    name, _, most = text.rpartition("=")
    try:
        bound = float(most)
    except ValueError:
        bound = math.nan
    if not name or not math.isfinite(bound):
        raise argparse.ArgumentTypeError(f"{text!r} is no gate; write STRATEGY=NATS, such as every:2=0.05")
    return name, bound


def of_families(families: Sequence[str], num_layers: int, shares: Sequence[Fraction] = _SHARES) -> Sequence[str]:
    """Strategies of each family with these shares of the layers; the usual five without a family."""
    from skvr_dist.evaluate.curve import DEFAULT_STRATEGIES

    if not families:
        return DEFAULT_STRATEGIES
    sizes = sorted({max(1, int(num_layers * share)) for share in shares}, reverse=True)
    return ["full", *(f"{family}:{size}" for family in families for size in sizes)]


if __name__ == "__main__":
    main()
