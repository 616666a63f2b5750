"""Reports: what a smaller cache costs a model, or a standard and a routed run side by side.

    skvr-report --model runs/quickstart/routed --output runs/quickstart/caches
    skvr-report --model runs/quickstart/routed --work stdlib --format code --decode 48 --output runs/quickstart/caches
    skvr-report --standard runs/quickstart/standard --routed runs/quickstart/routed --output runs/quickstart

With --model (a run, an import or an export) report.md and report.html begin with the cache to keep: the smallest whose
cost over full retention is below --most-rise, its interval included. Then come quality against bytes for families of
strategies and for the plan of tools/plan_cache.py, what fits on a GPU, and the texts that change most: continuations of
held-out text, or with --work the answers to a file (or corpus) as tools/answers.py takes it. --replay adds what a
workload replayed against vLLM found (tools/replay.py).

With --standard and --routed two runs (either may be an import) are compared: retention curves in one picture, table,
continuations, speed. Both are measured over the held-out data of the first that was trained here, or over that of
--data and --sequence-length.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from skvr_dist.command import a_path, at_least, new_parser, parse, positive, run_command, share
from skvr_dist.commands.answers import QUESTIONS, add_question_place
from skvr_dist.errors import UserError
from skvr_dist.files import prove_folder

if TYPE_CHECKING:
    from pathlib import Path


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Measure, and write the report."""
    options = _options()
    report = _of_caches(options) if options.model else _of_two_runs(options)
    print(report.read_text(encoding="utf-8"))
    print(f"written: {report}")


def _of_two_runs(options: argparse.Namespace) -> Path:
    from skvr_dist.evaluate.curve import DEFAULT_STRATEGIES
    from skvr_dist.evaluate.report import write_report

    return write_report(
        options.standard,
        options.routed,
        prove_folder(options.output),
        strategies=options.strategies or DEFAULT_STRATEGIES,
        sequences=options.sequences,
        prompt=options.prompt,
        data=options.data,
        sequence_length=options.sequence_length,
    )


def _of_caches(options: argparse.Namespace) -> Path:
    from skvr_dist.commands.cache_report import write_cache_report

    return write_cache_report(options, prove_folder(options.output))


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=a_path, metavar="MODEL", help="report on its caches")
    parser.add_argument("--standard", type=a_path, metavar="RUN")
    parser.add_argument("--routed", type=a_path, metavar="RUN")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER")
    parser.add_argument("--strategies", nargs="+", metavar="S", help="cache strategies")
    parser.add_argument(
        "--sequences",
        type=at_least(1, 10**7),
        metavar="N",
        help="held-out sequences (default: 256, or as many as there are)",
    )
    parser.add_argument("--data", metavar="FOLDER", help="another held-out data set than the runs'")
    parser.add_argument(
        "--sequence-length", type=at_least(1, 10**8), metavar="N", help="tokens per sequence (default: the runs')"
    )
    parser.add_argument("--prompt", help="two runs: text to continue (default: the beginning of the held-out data)")
    caches = parser.add_argument_group("with --model")
    caches.add_argument("--most-rise", type=positive, default=0.05, metavar="NATS", help="that you would pay (0.05)")
    caches.add_argument("--memory-gib", type=positive, default=80.0, metavar="X", help="of the GPU (default: 80)")
    caches.add_argument("--context", type=at_least(1, 10**9), metavar="N", help="tokens (default: the model's most)")
    caches.add_argument("--work", dest="file", type=a_path, metavar="FILE", help="questions, or a corpus of code")
    caches.add_argument("--format", default="examples", choices=QUESTIONS, help="of --work (default: examples)")
    caches.add_argument("--decode", type=at_least(1, 10**5), default=32, metavar="N", help="tokens of an answer (32)")
    caches.add_argument("--count", type=at_least(1), default=50, metavar="N", help="answers (default: 50)")
    add_question_place(caches)
    caches.add_argument("--validation-share", type=share, default=0.05, metavar="X", help="of a corpus (0.05)")
    caches.add_argument("--replay", type=a_path, metavar="FILE", help="replay.json, to be a section of the report")
    caches.add_argument("--batch-size", type=at_least(1), default=8, help="sequences at a time (default: 8)")
    options = parse(parser)
    pair = (options.standard, options.routed)
    if options.model and any(pair):
        raise UserError("--model reports on one model's caches; leave out --standard and --routed")
    if not options.model and not all(pair):
        raise UserError("a report is on --model, or on both --standard and --routed; give one or the other")
    if options.model and set(options.strategies or ()) == {"full"}:
        raise UserError("--strategies full leaves nothing to hold against full retention; name smaller caches too")
    if options.question_first_prob is not None and options.file is None:
        raise UserError("--question-first-prob is of the questions in --work; give --work FILE, or leave it out")
    return options


if __name__ == "__main__":
    main()
