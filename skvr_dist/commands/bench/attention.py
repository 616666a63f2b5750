"""Attention on a GPU: our kernel beside FlashAttention 2 and 4, forwards and backwards, at several shapes.

    skvr-bench attention
    skvr-bench attention --json attention.json

FlashAttention 2 is PyTorch's own, FlashAttention 4 the package flash-attn-4 where it is installed. Ours, of
`pip install ./kernels`, is to be at least 0.95 times as fast as FlashAttention 2 forwards and 0.8 times backwards at
4,096 tokens, and faster than FlashAttention 2 on a gathered copy where sequences of up to 1,024 tokens have donors
each. Every way is checked against the formula before it is timed. Exit code 1: a figure is missed.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import ArgumentParser, Namespace
from statistics import median
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, at_least, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.bench.attention import Shape, Times

FORWARD, BACKWARD, OF_EACH = 0.95, 0.8, 1.0


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measurements of each way (default: 5)")
    parser.add_argument("--milliseconds", type=at_least(1), default=50, help="of a measurement (default: 50)")
    add_json(parser)


def run(options: Namespace) -> int:
    """Measure; returns the exit code."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("skvr-bench attention needs a GPU, and PyTorch sees none here")
    if importlib.util.find_spec("skvr_kernels") is None:
        raise UserError("skvr-bench attention needs the package skvr_kernels; install it: pip install ./kernels")

    from skvr_dist.lab.bench.attention import SHAPES, attention_times
    from skvr_dist.model.attention_choice import resolve

    try:
        has_fa4 = bool(resolve("fa4", torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 128))
    except UserError as error:
        print(error, file=sys.stderr)
        has_fa4 = False
    taken = {
        shape: attention_times(shape, shape.ways(has_fa4), options.rounds, options.milliseconds) for shape in SHAPES
    }
    figures = [figure for shape, times in taken.items() for figure in _figures(shape, times)]
    table = tabulate(
        [row for shape, times in taken.items() for row in _rows(shape, times)],
        headers=["shape", "way", "forward (us)", "TFLOP/s", "backward (us)", "TFLOP/s"],
        tablefmt="github",
    )
    record: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    record["milliseconds"] = {str(shape): {each.way: vars(each) for each in times} for shape, times in taken.items()}
    return conclude(figures, table=f"{torch.cuda.get_device_name()}\n{table}", record=record, json_file=options.json)


def _rows(shape: Shape, times: list[Times]) -> list[list[str]]:
    rows = []
    for each in times:
        forward, backward = median(each.forward), median(each.backward)
        rates = shape.operations / forward / 1e9, 2.5 * shape.operations / backward / 1e9
        cells = [f"{1e3 * forward:.0f}", f"{rates[0]:.0f}", f"{1e3 * backward:.0f}", f"{rates[1]:.0f}"]
        rows.append([str(shape), each.way, *cells])
    return rows


def _figures(shape: Shape, times: list[Times]) -> list[Figure]:
    """What is asked of ours at this shape."""
    by_way = {each.way: each for each in times}
    own = by_way["own"]
    if shape.donors_of_each and shape.sequence <= 1024:
        bounds = {"forward": OF_EACH, "backward": OF_EACH}
        other = by_way["FA2 on a gathered copy"]
    elif not shape.donors_of_each and shape.sequence >= 4096 and not shape.document:
        bounds, other = {"forward": FORWARD, "backward": BACKWARD}, by_way["FA2"]
    else:
        return []
    figures = []
    for direction, bound in bounds.items():
        ratio = own.ratio_to(other, direction)
        figures.append(Figure(f"{shape}: {ratio:.2f} x {other.way} {direction}", f"{bound:.2f}", ratio >= bound))
    return figures
