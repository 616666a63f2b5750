"""Prove that every layout trains the same: each against a plain single-process reference.

    skvr-verify layouts --matrix quick
    skvr-verify layouts --matrix full --json layouts.json
    skvr-verify layouts --matrix full --json layouts.json --resume
    skvr-verify layouts --matrix full --only "offload|bf16"
    skvr-verify layouts --set policy=window --set attention=eager
    skvr-verify layouts --first-use
    skvr-verify layouts --support

Runs on the CPU of this machine, several processes at a time. Errors are relative: of losses, of the worst weight's
gradient in the first step and in later ones, of its length over all steps, of the gradient norm before clipping, of
what AdamW made of the gradients, and of the worst weight after the last step; bytes are measured over expected on the
rank furthest off. Exits 1 when a figure is out of tolerance. With --first-use groups obey NCCL's rule that the first
use of a communicator blocks until its ranks have come, so that what would hang on GPUs fails here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from skvr_dist.command import add_json, write_json
from skvr_dist.errors import EXIT_MISSED, UserError

if TYPE_CHECKING:
    from skvr_dist.lab.verify.cases import Case
    from skvr_dist.lab.verify.compare import Outcome


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--matrix", choices=["quick", "full"], default="quick")
    parser.add_argument("--layout", help="only layouts whose name contains this")
    parser.add_argument("--only", metavar="PATTERN", help="only cases in whose name this regular expression is found")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="train every case with that policy, family or attention in place of its own",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and stop")
    parser.add_argument("--first-use", action="store_true", help="keep NCCL's rule of first use")
    add_json(parser, "write the outcomes there too")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes in --json FILE, run what is missing")
    parser.add_argument("--support", action="store_true", help="print which combinations are supported, and stop")


def run(options: Namespace) -> int:
    """Run the cases that are asked for; returns the exit code."""
    if options.support:
        from skvr_dist.config.layouts import support_matrix

        print(support_matrix())
        return 0
    cases = _chosen_cases(options)
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    outcomes = _known_outcomes(options.json) if options.resume else []
    known = {outcome.case for outcome in outcomes}
    return _run_cases([case for case in cases if case not in known], outcomes, options)


def _chosen_cases(options: Namespace) -> list[Case]:
    """The cases of the matrix that --layout and --only select, changed as --set says.

    Raises:
        UserError: none is left, --only cannot be read, or --set names what there is not.
    """
    from skvr_dist.lab.verify.cases import full_matrix, quick_matrix

    cases = _changed({"quick": quick_matrix, "full": full_matrix}[options.matrix](), options.set)
    cases = [case for case in cases if options.layout is None or options.layout in case.layout]
    if not cases:
        raise UserError(
            f"no layout of the {options.matrix} matrix has {options.layout!r} in its name; leave --layout out"
        )
    try:
        cases = [case for case in cases if options.only is None or re.search(options.only, case.name)]
    except re.error as error:
        raise UserError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not cases:
        raise UserError(
            f"no case of the {options.matrix} matrix has {options.only!r} in its name; --list prints the names, "
            f"leave --only out to run them all"
        )
    return cases


def _changed(cases: list[Case], assignments: list[str]) -> list[Case]:
    """Cases with other values of some fields, each once.

    Raises:
        UserError: there is no such field, or no such value of it.
    """
    from skvr_dist.lab.verify.cases import CHOICES

    for assignment in assignments:
        name, _, value = assignment.partition("=")
        if value not in CHOICES.get(name, ()):
            known = "; ".join(f"{each}={', '.join(values)}" for each, values in CHOICES.items())
            raise UserError(f"--set {assignment} is not one of {known}")
        change: dict[str, Any] = {name: value}
        cases = [dataclasses.replace(case, **change) for case in cases]
    return list(dict.fromkeys(cases))


def _run_cases(cases: Sequence[Case], outcomes: list[Outcome], options: Namespace) -> int:
    """Run cases after those whose outcomes are known, and print them all; returns the exit code."""
    from skvr_dist.lab.verify.matrix import as_json, as_table, run_matrix

    kept = f" ({len(outcomes)} kept)" if outcomes else ""
    started = time.perf_counter()
    for outcome in tqdm(run_matrix(cases, first_use=options.first_use), total=len(cases), unit="case", disable=None):
        outcomes.append(outcome)
        if outcome.misses:  # not only in the table, which a long run prints at its end
            tqdm.write(f"out of tolerance: {', '.join(outcome.misses)} of {outcome.case.name}")
        if options.json:
            write_json(options.json, as_json(outcomes))
    print(as_table(outcomes))
    missed = [outcome for outcome in outcomes if outcome.misses]
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(outcomes)} cases{kept} in {minutes:.1f} min, {len(missed)} out of tolerance")
    return EXIT_MISSED if missed else 0


def _known_outcomes(file: Path | None) -> list[Outcome]:
    """Read the outcomes that an earlier call wrote; none if the file does not exist.

    Raises:
        UserError: no file is named, or another version of this command wrote it.
    """
    if file is None:
        raise UserError("--resume needs --json FILE, where the outcomes of the earlier call are")
    if not file.exists():
        return []

    from skvr_dist.lab.verify.matrix import from_json

    try:
        return from_json([_numbers(outcome) for outcome in json.loads(file.read_text(encoding="utf-8"))])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} does not hold outcomes of this version ({error}); leave --resume out") from None


def _numbers(outcome: dict[str, Any]) -> dict[str, Any]:
    """An outcome with the nulls of its JSON turned back into NaN, which is out of every tolerance."""
    ratios = outcome.get("bytes_ratio", {})
    outcome = {**outcome, "bytes_ratio": {kind: _number(ratio) for kind, ratio in ratios.items()}}
    return {name: _number(value) for name, value in outcome.items()}


def _number(value: Any) -> Any:
    return math.nan if value is None else value
