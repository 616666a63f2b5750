"""The report as Markdown."""

from __future__ import annotations

from tabulate import tabulate

from skvr_dist.evaluate.cache_report import tables
from skvr_dist.evaluate.cache_report.content import SHOWN, CacheReport, origin, sentences
from skvr_dist.evaluate.replay.report import fenced, markdown_parts


def as_markdown(report: CacheReport) -> str:
    """The whole report."""
    parts = [f"# Caches of {report.model}", " ".join(sentences(report))]
    for table in (tables.quality(report), tables.memory(report), *([tables.scores(report)] if report.scores else [])):
        rows = tabulate(table.rows, headers=table.headers, tablefmt="github", disable_numparse=True)
        parts += [f"## {table.title}", rows]
    parts += ["## What changes most", _measure(report)]
    for strategy, cases in report.cases.items():
        parts.append(f"### At `{strategy}`")
        parts += [] if cases else ["No text changes."]
        for case in cases:
            parts.append(f"Change {case.change:.2f}, after")
            parts += [fenced(case.prompt), "at full retention", fenced(case.at_full), f"at `{strategy}`"]
            parts.append(fenced(case.at_smaller))
            parts += [] if case.right is None else ["right is", fenced(case.right)]
    if report.replayed:
        parts += [f"## Under load: {report.replayed.name}", *markdown_parts(report.replayed, SHOWN, level=3)]
    parts += ["## How this was made", origin(report)]
    return "\n\n".join(parts) + "\n"


def _measure(report: CacheReport) -> str:
    return (
        f"Of {report.compared} texts ({report.work}), those that differ most from full retention's: 1 less twice the "
        f"characters that both have in the same order over those of both."
    )
