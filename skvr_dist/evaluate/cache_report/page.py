"""The report as one HTML file that needs no other, and fits a phone as it fits a desk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from skvr_dist.evaluate.cache_report import tables
from skvr_dist.evaluate.cache_report.chart import bar_chart, legend, quality_chart
from skvr_dist.evaluate.cache_report.content import SHOWN, CacheReport, Case, origin, sentences
from skvr_dist.evaluate.cache_report.tables import Table
from skvr_dist.evaluate.replay.report import (
    LEGEND,
    ReplayReport,
    costs,
    measure_in_words,
    subject,
    what_was_replayed,
)

_STYLE = """
:root{color-scheme:light dark;--text:#222;--back:#fff;--soft:#666;--line:#ddd;--box:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--text:#e6e6e6;--back:#16181b;--soft:#a0a4a8;--line:#3a3d41;--box:#22262b}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--text);background:var(--back)}
body{max-width:52rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.2;overflow-wrap:anywhere}h2{font-size:1.2rem;margin-top:2rem}
.advice{background:var(--box);border-left:4px solid #0072b2;padding:.8rem 1rem;font-size:1.05rem}
.soft{color:var(--soft);font-size:.9rem}
svg{width:100%;max-width:40rem;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--text)}
svg .grid{stroke:var(--line)}svg .most{stroke:var(--soft);stroke-dasharray:4 3}
.legend span{margin-right:1rem;white-space:nowrap}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.3rem .4rem;border-bottom:1px solid var(--line)}
td:first-child,td:last-child{overflow-wrap:anywhere}summary{cursor:pointer;margin:1rem 0}
pre{background:var(--box);padding:.5rem;margin:.2rem 0;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}.case{border-bottom:1px solid var(--line);padding:.5rem 0}
@media(max-width:40rem){.pair{grid-template-columns:1fr}thead{display:none}
tr{display:block;border-bottom:1px solid var(--line);padding:.4rem 0}
td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0}
td:first-child{font-weight:600}td:empty{display:none}td{overflow-wrap:anywhere;text-align:right}
td::before{text-align:left;white-space:nowrap;content:attr(data-name);color:var(--soft);font-weight:400}}
"""


def as_page(report: CacheReport) -> str:
    """The whole report."""
    advice = " ".join(_in_html(sentence) for sentence in sentences(report))
    held = [(memory.strategy, memory.sequences) for memory in report.memory]
    body = [
        f"<h1>Caches of {escape(report.model)}</h1>",
        f'<p class="advice">{advice}</p>',
        "<h2>Quality against cache bytes</h2>",
        quality_chart(report.families, report.most_rise),
        legend(list(report.families)),
        '<p class="soft">Up: what the loss rises over full retention, in nats per token, on an axis of square roots; '
        f"bars are intervals of 95 % over documents. Dashed: the {report.most_rise:g} that are allowed.</p>",
        f"<details><summary>All that was measured, with the layers</summary>{_table(tables.quality(report))}</details>",
        f"<h2>{escape(tables.memory(report).title)}</h2>",
        bar_chart(held, "Sequences held at once"),
        '<p class="soft">Sequences of the whole context that are in the cache at once.</p>',
        _table(tables.memory(report)),
    ]
    if report.scores:
        body += [f"<h2>{escape(tables.scores(report).title)}</h2>", _table(tables.scores(report))]
    body += [
        "<h2>What changes most</h2>",
        f'<p class="soft">Of {report.compared} texts ({escape(report.work)}), those that differ most from full '
        "retention's: 1 less twice the characters that both have in the same order over those of both.</p>",
    ]
    for strategy, cases in report.cases.items():
        body.append(f"<h3>At {escape(strategy)}</h3>")
        body += [_case(case, strategy) for case in cases] or ["<p>No text changes.</p>"]
    body += _replayed(report.replayed) if report.replayed else []
    body.append(f'<h2>How this was made</h2><p class="soft">{_in_html(origin(report))}</p>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Caches of {escape(report.model)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.headers)
    rows = [
        "".join(
            f'<td data-name="{escape(name)}">{escape(cell)}</td>' for name, cell in zip(table.headers, row, strict=True)
        )
        for row in table.rows
    ]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _replayed(report: ReplayReport) -> list[str]:
    """The section on a replayed workload."""
    first = report.profiles[0].profile
    found = [f"<h2>Under load: {escape(report.name)}</h2>", f"<p>{_in_html(what_was_replayed(report))}</p>"]
    found += [_table(table) for table in tables.replayed(report)]
    found.append(f'<p class="soft">{_in_html(LEGEND)}</p>')
    if report.comparisons:
        found.append(f'<p class="soft">{_in_html(measure_in_words(report))}</p>')
    for comparison in report.comparisons:
        found.append(f"<h3>At {escape(comparison.profile)}</h3>")
        changed = report.changed(comparison, SHOWN)
        found += [] if changed else ["<p>No answer changes.</p>"]
        for answer in changed:
            title = f"{subject(answer)}: {costs(answer)}, after"
            both = ((f"at {first}", answer.at_first), (f"at {comparison.profile}", answer.at_thinner))
            found.append(_side_by_side(_titled(title, answer.prompt), both))
    return found


def _case(case: Case, strategy: str) -> str:
    both = (("at full retention", case.at_full), (f"at {strategy}", case.at_smaller))
    right = "" if case.right is None else _titled("right is", case.right)
    return _side_by_side(_titled(f"change {case.change:.2f}, after", case.prompt), both, right)


def _side_by_side(prompt: str, both: Sequence[tuple[str, str]], below: str = "") -> str:
    """Two texts (title, text) between what is read before them and what stands below."""
    pair = "".join(f"<div>{_titled(title, text)}</div>" for title, text in both)
    return f'<div class="case">{prompt}<div class="pair">{pair}</div>{below}</div>'


def _titled(title: str, text: str) -> str:
    return f'<span class="soft">{escape(title)}</span><pre>{escape(text)}</pre>'


def _in_html(sentence: str) -> str:
    """A sentence whose code stands between backticks."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(sentence))
