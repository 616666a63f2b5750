"""Memory and traffic in closed forms against the real engine, run as single ranks of made-up worlds.

    skvr-verify estimate --json estimate.json

Of each configuration the first, the second and the last stage train two steps on the CPU of this machine. Bytes of
every kind of operation must be exact, the peak of the tensors alive within 5 %.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.estimate.check import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", metavar="PATTERN", help="configurations in whose name a regular expression is found")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compare and report; returns the exit code."""
    from tqdm import tqdm

    from skvr_dist.lab.estimate.check import CASES, compare

    try:
        cases = [case for case in CASES if re.search(options.only or "", case.name)]
    except re.error as error:
        raise UserError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not cases:
        raise UserError(f"--only {options.only!r} is in no name of: {'; '.join(case.name for case in CASES)}")
    if any(case.attention == "routed" for case in cases):
        # The processes of virtual ranks, which have no GPU, interpret it; they find this when they load Triton.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    compared = [each for case in tqdm(cases, leave=False, disable=None) for each in compare(case)]
    rows = [_row(each) for each in compared]
    record = [row | {"traffic": _named(each)} for row, each in zip(rows, compared, strict=True)]
    table = tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github")
    return conclude(_figures(len(cases), compared), table=table, record=record, json_file=options.json)


def _row(each: Comparison) -> dict[str, object]:
    return {
        "configuration": each.case,
        "stage": each.stage,
        "estimated bytes": each.estimated_bytes,
        "measured": each.measured_bytes,
        "error": f"{each.error:+.2%}",
        "peak at": each.moment,
        "traffic": "; ".join(each.differing) or "exact",
    }


def _named(each: Comparison) -> dict[str, int]:
    return {f"{link} {operation}": size for (link, operation), size in sorted(each.traffic.items())}


def _figures(cases: int, compared: Sequence[Comparison]) -> list[Figure]:
    from skvr_dist.lab.estimate.check import MEMORY_BOUND

    worst = max(compared, key=lambda each: abs(each.error))
    wrong = [each for each in compared if each.differing]
    kinds = sum(len(each.traffic) for each in compared)
    return [
        Figure(
            f"{cases} configurations, {len(compared)} ranks: largest error of the peak {worst.error:+.2%} "
            f"({worst.case}, stage {worst.stage})",
            f"{MEMORY_BOUND:.0%}",
            abs(worst.error) <= MEMORY_BOUND,
        ),
        Figure(f"{len(wrong)} ranks with other bytes in any of {kinds} kinds of operations", "none", not wrong),
    ]
