"""Run the parity matrix and show it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from skvr_dist.lab.verify.cases import LAYOUTS, Case
from skvr_dist.lab.verify.compare import Outcome, compare
from skvr_dist.lab.verify.measure import run_cases
from skvr_dist.lab.verify.ranks import run_ranks

_SECONDS_PER_CASE, _SECONDS_PER_COMPILED_CASE = 120.0, 900.0


def run_matrix(cases: Iterable[Case], *, first_use: bool = False) -> Iterator[Outcome]:
    """The outcome of every case; neighbouring cases of one layout share their processes.

    Args:
        first_use: under NCCL's rule of first use (`skvr_dist.lab.verify.first_use`).
    """
    for layout, group in itertools.groupby(cases, key=lambda case: case.layout):
        together = list(group)
        seconds = sum(_SECONDS_PER_CASE if case.compile == "off" else _SECONDS_PER_COMPILED_CASE for case in together)
        by_rank = run_ranks(LAYOUTS[layout].ranks, run_cases, together, first_use, seconds=seconds)
        for case, *results in zip(together, *by_rank, strict=True):
            yield compare(case, results)


def as_table(outcomes: Iterable[Outcome]) -> str:
    """A line per case, in Markdown; what a case has beyond the plainest one is in the column `also`."""
    header = ["layout", "policy", "checkpointing", "tied", "also", "initial", "evaluation", "loss", "gradient"]
    header += ["later gradients", "gradient scale", "norm", "update", "weights"]
    header += ["bytes: parameters", "gradients", "optimizer", "sent / bound", "verdict"]
    return tabulate([_row(outcome) for outcome in outcomes], headers=header, tablefmt="github", disable_numparse=True)


def _row(outcome: Outcome) -> list[str]:
    case = outcome.case
    errors = [outcome.initial, outcome.evaluation, outcome.loss, outcome.gradient, outcome.later_gradients]
    errors += [outcome.gradient_scale, outcome.norm, outcome.update, outcome.weights]
    return [
        case.layout,
        case.policy,
        case.checkpointing,
        "yes" if case.tied else "no",
        ", ".join(case.also),
        *(f"{error:.0e}" if error else "0" for error in errors),
        *(f"{ratio:.3f}" for ratio in outcome.bytes_ratio.values()),
        f"{outcome.crossing_ratio:.3f}" if LAYOUTS[case.layout].parallel.get("pipeline", 1) > 1 else "-",
        ", ".join(outcome.misses) or "ok",
    ]


def as_json(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A dictionary per case."""
    return [{**asdict(outcome), "misses": outcome.misses} for outcome in outcomes]


def from_json(outcomes: Iterable[dict[str, Any]]) -> list[Outcome]:
    """What `as_json` made dictionaries of.

    Raises:
        TypeError: another version of this made them.
    """
    fields = [{name: value for name, value in outcome.items() if name != "misses"} for outcome in outcomes]
    return [Outcome(**{**each, "case": Case(**each["case"])}) for each in fields]
