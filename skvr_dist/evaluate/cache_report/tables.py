"""The tables of the report, as headers and rows of text, which both of its forms show."""

from __future__ import annotations

import math
from typing import NamedTuple

from skvr_dist.evaluate.cache_report.content import CacheReport
from skvr_dist.evaluate.replay.report import COST_HEADERS, HEADERS, ReplayReport, cost_rows, speed_rows
from skvr_dist.evaluate.retention import percent

_GIB = 2**30


class Table(NamedTuple):
    """A title, headers and rows."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def quality(report: CacheReport) -> Table:
    """What each set of layers costs, the largest cache first, with all the names that it was measured by."""
    rows, names = [], _names(report)
    for point in sorted(report.measurement.points, key=lambda point: (-point.retained, point.loss)):
        if point.strategy not in names:
            continue
        rise = point.rise
        cost = "" if rise is None or point == report.measurement.points[0] else f"{rise.mean:+.4f}"
        interval = "" if not cost or rise is None else f"{rise.low:+.4f} to {rise.high:+.4f}"
        rows.append(
            [
                names[point.strategy],
                percent(point.retention),
                f"{point.cache_bytes_per_token:,}",
                f"{point.loss:.4f}",
                f"{math.exp(point.loss):.2f}",
                cost,
                interval,
                ",".join(map(str, report.retained[point.strategy])),
            ]
        )
    headers = ["strategy", "retention", "bytes/token", "loss", "perplexity", "rise", "95 % interval", "layers"]
    return Table("What each cache costs", headers, rows)


def _names(report: CacheReport) -> dict[str, str]:
    """The names of each set of layers, by the first of them."""
    by_layers: dict[tuple[int, ...], list[str]] = {}
    for name, layers in report.retained.items():
        by_layers.setdefault(layers, []).append(name)
    return {names[0]: ", ".join(names) for names in by_layers.values()}


def memory(report: CacheReport) -> Table:
    """What fits on the GPU."""
    rows = [
        [each.strategy, f"{each.weights / _GIB:.3g}", f"{each.cache_bytes_per_token:,}", f"{each.sequences:,}"]
        for each in report.memory
    ]
    return Table(f"What fits on {report.server}", ["strategy", "weights GiB", "bytes/token", "sequences"], rows)


def scores(report: CacheReport) -> Table:
    """The scores of the work, with their change over full retention."""
    rows = []
    for point in report.scores:
        for name, score in point.scores.items():
            unit, digits = (1, 4) if name == "loss" else (100, 1)
            mean, low, high = (f"{unit * value:+.{digits}f}" for value in point.changes[name])
            shown = "" if point.strategy == report.scores[0].strategy else f"{mean} ({low} to {high})"
            rows.append([point.strategy, name, f"{unit * score.mean:.{digits}f}", shown])
    return Table(f"Scores: {report.work}", ["strategy", "score", "value", "change over full"], rows)


def replayed(report: ReplayReport) -> list[Table]:
    """What a replayed workload found: speed, and what the answers cost."""
    tables = [Table("Speed", HEADERS, speed_rows(report))]
    return [*tables, Table("Answers", COST_HEADERS, cost_rows(report))] if report.comparisons else tables
