"""What a replay found, as a table and as Markdown with the answers that change most."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from tabulate import tabulate

from skvr_dist.errors import UserError
from skvr_dist.evaluate.replay.compare import ChangedAnswer, Comparison
from skvr_dist.evaluate.replay.figures import ProfileFigures
from skvr_dist.section import in_words

HEADERS = ["profile", "failed", "first token (s)", "95 %", "per token (ms)", "95 %", "tokens/s", "tokens"]
HEADERS += ["cache tokens", "cache in use", "preempted"]
_LATE = 0.05
"""Seconds by which a request may be sent too late without a word."""
COST_HEADERS = ["profile", "answers", "same", "tokens chosen alike", "cost per token", "largest"]


@dataclass(frozen=True)
class ReplayReport:
    """A trace at several profiles, the first of which answers are compared with."""

    trace: str
    model: str
    """The export, or the servers' addresses."""
    requests: int
    seconds: float
    """Until the last arrival."""
    exact_tokens: bool
    """Whether every answer has the tokens wanted."""
    profiles: list[ProfileFigures]
    comparisons: list[Comparison]
    """Of each profile but the first; none where speed alone was measured."""
    command: str
    """That made the report."""
    commit: str | None
    """Of the code; None for an installed release."""

    @property
    def name(self) -> str:
        """The trace's file."""
        return Path(self.trace).name

    def changed(self, comparison: Comparison, most: int) -> list[ChangedAnswer]:
        """The answers that change most, of those whose texts are not the same."""
        return [answer for answer in comparison.answers if answer.parts_at is not None][:most]


def read_report(file: Path) -> ReplayReport:
    """A report that was written as JSON.

    Raises:
        UserError: the file is none.
    """
    try:
        return TypeAdapter(ReplayReport).validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{file} is no replay.json ({in_words(error)[:200]}); give what `replay run` has written"
        ) from None


def speed_rows(report: ReplayReport) -> list[list[str]]:
    """A row for each profile, below `HEADERS`."""
    return [
        [
            each.profile,
            f"{each.failed} of {each.requests}",
            _number(each.first_token_median, 3),
            _number(each.first_token_p95, 3),
            _number(each.per_token_median, 1, 1e3),
            _number(each.per_token_p95, 1, 1e3),
            _number(each.steady_tokens_per_second, 1),
            f"{each.tokens:,}",
            _number(each.counters.get("cache_tokens"), 0),
            _number(each.counters.get("kv_cache_usage_perc"), 0, 100, " %"),
            _number(each.counters.get("num_preemptions_total"), 0),
        ]
        for each in report.profiles
    ]


def cost_rows(report: ReplayReport) -> list[list[str]]:
    """What the answers of the first profile cost at each other one, below `COST_HEADERS`."""
    return [
        [
            each.profile,
            f"{each.compared}",
            f"{each.same}",
            _number(each.agreement, 1, 100, " %"),
            _number(each.mean_cost, 4),
            _number(each.answers[0].cost if each.answers else None, 4),
        ]
        for each in report.comparisons
    ]


def table_of(report: ReplayReport) -> str:
    """The tables for a terminal."""
    tables = [_table(HEADERS, speed_rows(report))]
    tables += [_table(COST_HEADERS, cost_rows(report))] if report.comparisons else []
    notes = [
        f"{each.profile}: {count} failed ({why})" for each in report.profiles for why, count in each.failures.items()
    ]
    notes += [
        f"{each.profile}: 5 % of the requests were sent {each.late_p95:.2f} s or more after their arrival, by a client "
        f"that was too slow; their times to first token hold that"
        for each in report.profiles
        if each.late_p95 is not None and each.late_p95 > _LATE
    ]
    return "\n\n".join([*tables, *notes])


def as_markdown(report: ReplayReport, cases: int) -> str:
    """The whole report.

    Args:
        cases: answers shown for each profile.
    """
    parts = [f"# {report.name}, replayed", *markdown_parts(report, cases, level=2)]
    parts += ["## How this was made", f"`{report.command}`" + (f", commit {report.commit}" if report.commit else "")]
    return "\n\n".join(parts) + "\n"


def markdown_parts(report: ReplayReport, cases: int, level: int) -> list[str]:
    """Its paragraphs, without title and origin.

    Args:
        level: of the headings.
    """
    parts = [what_was_replayed(report), table_of(report), LEGEND]
    first, heading = report.profiles[0].profile, "#" * level
    if report.comparisons:
        parts += [f"{heading} What changes most", measure_in_words(report)]
    for comparison in report.comparisons:
        parts.append(f"{heading}# At `{comparison.profile}`")
        changed = report.changed(comparison, cases)
        parts += [] if changed else ["No answer changes."]
        for answer in changed:
            parts += [f"**{subject(answer)}**: {costs(answer)}, after", fenced(answer.prompt)]
            parts += [f"at `{first}`", fenced(answer.at_first)]
            parts += [f"at `{comparison.profile}`", fenced(answer.at_thinner)]
    return parts


LEGEND = (
    "First tokens are counted from a request's arrival; time per token is that of an answer after its first token; "
    "tokens/s are those of all answers between the warm-up and the last arrival. The cache's tokens, its largest use "
    "and preemptions are the engine's own counters."
)


def measure_in_words(report: ReplayReport) -> str:
    """What answers are ranked by."""
    first = report.profiles[0].profile
    return (
        f"Ranked by what the answer of `{first}` costs at the profile: the mean, over the tokens of that answer, of "
        f"the log probability at `{first}` less that at the profile, in nats, each token after the same tokens before "
        f"it. Texts do not rank, because one near-tie turns them into others. «Chosen alike» are the tokens that the "
        f"profile would have chosen too, after the same tokens."
    )


def what_was_replayed(report: ReplayReport) -> str:
    """A sentence on the trace and its servers."""
    ended = "Every answer has the tokens wanted." if report.exact_tokens else "Answers end where the model ends them."
    return f"{report.requests} requests in {report.seconds:,.1f} seconds, greedily, from {report.model}. {ended}"


def subject(answer: ChangedAnswer) -> str:
    """What a request is about, and where it stands in the trace."""
    place = Path(answer.place).name
    return f"{answer.name} ({place})" if answer.name else place


def costs(answer: ChangedAnswer) -> str:
    """What an answer costs, and where its text parts from the first one's."""
    return (
        f"cost {answer.cost:.4f}, the worst token {answer.worst_token!r} {answer.worst_cost:.2f}, parting at token "
        f"{answer.parts_at}"
    )


def fenced(text: str) -> str:
    """A block of Markdown, between fences that are longer than any in it."""
    fence = "`" * (1 + max([3, *map(len, re.findall("`+", text))]))
    return f"{fence}text\n{text}\n{fence}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", stralign="right", disable_numparse=True)


def _number(value: float | None, digits: int, unit: float = 1, sign: str = "") -> str:
    return "n/a" if value is None else f"{unit * value:,.{digits}f}{sign}"
