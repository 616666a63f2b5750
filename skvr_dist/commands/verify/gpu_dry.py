"""Run the host side of GPU steps without a GPU: launches, waits for the device, and memory, at real sizes.

    skvr-verify gpu-dry --json gpu-dry.json
    skvr-verify gpu-dry --only "qwen3-1.7b, engine" --output gpu-dry.md
    skvr-verify gpu-dry --only "^order" --json order.json

Under PyTorch's CUDA build lies a runtime that runs nothing (docs/gpu-dry.md): every line of Python runs, and what it
asks of the device is counted. Each row is a process: the second step of one rank with bf16 and ZeRO-1, of two
micro-batches of one sequence of 4,096 tokens. Rows "order" are the layouts of the quick matrix, a process for each
rank: two steps and an evaluation over NCCL, whose calls are written down and played by its rule of first use. Exits 1
when a step waits for the device inside a micro-batch or more than once, when a compiled decoder launches too many
kernels, when the loss takes too much memory, or when ranks of a layout would wait for each other for ever or do not
agree on what they do. Needs a CUDA build of PyTorch with its wheels, gcc, and no GPU.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, conclude
from skvr_dist.errors import UserError
from skvr_dist.files import prove_writable, write_whole

MOST_WAITS, MOST_LAUNCHES, MOST_LOSS_MIB = 1, 900, 700


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", metavar="PATTERN", help="rows in whose name a regular expression is found")
    parser.add_argument("--attention", default="auto", help="model.attention of all rows (default: auto)")
    parser.add_argument("--output", metavar="FILE", help="write the tables there too")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and report; returns the exit code.

    Raises:
        UserError: no CUDA build, no row of that name, or a measurement failed.
    """
    from tqdm import tqdm

    from skvr_dist.lab.gpu_dry.layouts import layouts, orders
    from skvr_dist.lab.gpu_dry.library import build
    from skvr_dist.lab.gpu_dry.measure import measure, measurements

    output = None if options.output is None else prove_writable(options.output)
    try:
        rows = [row for row in measurements() if re.search(options.only or "", row.name)]
        names = [name for name in layouts() if re.search(options.only or "", f"order, {name}")]
    except re.error as error:
        raise UserError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not rows and not names:
        known = [row.name for row in measurements()] + [f"order, {name}" for name in layouts()]
        raise UserError(f"--only {options.only!r} is in no name of: {'; '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        bar = tqdm(rows, leave=False, disable=None)
        record = list(measure(bar, Path(folder), options.attention))
        played = list(orders(tqdm(names, leave=False, disable=None), Path(folder)))
    figures = [*figures_of(record), *figures_of_orders(played)]
    table = "\n\n".join(part for part in (tables_of(record), table_of_orders(played)) if part)
    if output is not None:
        write_whole(output, "\n".join([table, "", *map(str, figures), ""]))
    return conclude(figures, table=table, record=[*record, *played], json_file=options.json)


def table_of_orders(played: Sequence[dict[str, Any]]) -> str:
    """How the ranks of each layout talk, and where they would wait for each other for ever."""
    rows = [
        {
            "layout": each["layout"],
            "ranks": each["ranks"],
            "communicators": each["communicators"],
            "collectives": each["collectives"],
            "messages": each["messages"],
            "order": "; ".join([*each["stuck"], *each["differing"]]) or "no hang",
        }
        for each in played
    ]
    return tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github") if rows else ""


def figures_of_orders(played: Sequence[dict[str, Any]]) -> list[Figure]:
    """Layouts whose ranks hang by the rule of first use, or differ in what they do."""
    if not played:
        return []
    counts = {what: sum(bool(each[what]) for each in played) for what in ("stuck", "differing")}
    return [
        Figure(f"{counts['stuck']} of {len(played)} layouts hang over NCCL", "0", not counts["stuck"]),
        Figure(
            f"{counts['differing']} of {len(played)} layouts with ranks that differ in what they do",
            "0",
            not counts["differing"],
        ),
    ]


def tables_of(record: Sequence[dict[str, Any]]) -> str:
    """What each row asked for, and where it waited."""
    if not record:
        return ""
    rows = [_row(each) for each in record]
    places = Counter[tuple[str, str, str]]()
    for each in record:
        for wait in each["waiting"]:
            kind = "update" if wait["in_update"] else "micro-batch"
            places[wait["where"], kind, wait["package"]] += wait["times"]
    tables = [tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github")]
    if places:
        lines = [(*place, times) for place, times in sorted(places.items())]
        headers = ["waits for the device", "in", "whose", "times in all rows"]
        tables.append(tabulate(lines, headers=headers, tablefmt="github"))
    return "\n\n".join(tables)


def _row(each: dict[str, Any]) -> dict[str, object]:
    parts = each.get("launches_by_instruction", {})
    mine, others = (_waits(each, in_update=None, ours=ours) for ours in (True, False))
    return {
        "step": each["row"],
        "launches": each["launches"],
        "forward": parts.get("ForwardPass", ""),
        "backward": parts.get("BackwardPass", ""),
        "update": parts.get("OptimizerStep", ""),
        "Triton's": each["triton_launches"],
        "products": each["products"],
        "copies to device": each["copies_to_device"],
        "to host": each["copies_to_host"],
        "waits": each["waits"],
        "ours": mine,
        "of others": others,
        "peak GiB": f"{each['peak_gib']:.2f}",
        "loss MiB": f"{each['loss_extra_mib']:.0f}" if "loss_extra_mib" in each else "",
        "host s": f"{each['step_seconds']:.2f}",
    }


def _waits(each: dict[str, Any], *, in_update: bool | None, ours: bool) -> int:
    """How often a row waited on lines of this project, or of others; in the update, in micro-batches, or in both."""
    return sum(
        wait["times"]
        for wait in each["waiting"]
        if (wait["package"] == "skvr_dist") is ours and in_update in (None, wait["in_update"])
    )


def figures_of(record: Sequence[dict[str, Any]]) -> list[Figure]:
    """The figures that the rows have something to say about."""
    if not record:
        return []
    return [
        *_most_waits(record, "inside micro-batches", False, 0),
        *_most_waits(record, "of a step's update", True, MOST_WAITS),
        *_largest(record, "launches", "launches of a compiled step of {}", MOST_LAUNCHES, part="decoder"),
        *_largest(record, "loss_extra_mib", "MiB that {} takes beside its gradients", MOST_LOSS_MIB, part="loss"),
    ]


def _most_waits(record: Sequence[dict[str, Any]], where: str, in_update: bool, most: int) -> Iterator[Figure]:
    counts = [_waits(each, in_update=in_update, ours=True) for each in record]
    yield Figure(
        f"{max(counts)} waits of this project {where}, at most, in {len(counts)} rows", f"{most}", max(counts) <= most
    )


def _largest(record: Sequence[dict[str, Any]], key: str, what: str, most: int, *, part: str) -> Iterator[Figure]:
    rows = [each for each in record if each["part"] == part]
    if rows:
        worst = max(rows, key=lambda each: each[key])
        yield Figure(f"{worst[key]:.0f} {what.format(worst['row'])}", f"{most}", worst[key] <= most)
