"""How many answers a checkpoint gets right at each cache strategy, as a table and JSON.

    skvr-answers runs/finetune data/finetune/dev-v2.0.json --format squad --count 200
    skvr-answers runs/finetune data/finetune/dev-v2.0.json --format squad --count 200 --decode 32
    skvr-answers runs/retrieval/rise_seed-0 data/retrieval/held-out.jsonl
    skvr-answers runs/quickstart/routed stdlib --format code --decode 48
    skvr-answers runs/assistant data/tools.jsonl --format prompts --schema data/reply.schema.json --decode 200 \
        --gate every:2:valid=1 --gate every:2:calls=5

MODEL is a checkpoint's folder, or a run's, which stands for its latest checkpoint, or an export. `exact` is the share
of the answers that greedy decoding gives to the last token, `loss` is in nats per token of the answers. With --decode,
what is decoded with the smaller cache is scored as the file's benchmark does: exact match and F1 of SQuAD, HotpotQA and
TriviaQA, ROUGE-L and BLEU-1 of MS MARCO, ROUGE-L of RepLiQA. Changes over the first strategy have intervals of 95 %,
for which contexts are drawn again with their questions. Examples that name a `group` are counted by it too.

With --format code, FILE is a corpus (what tools/prepare_data.py takes as --input, such as stdlib), of whose held-out
documents lines are to be completed: exact match and edit similarity of the next line.

With --format prompts, FILE holds prompts, or chats with the tools that the assistant may call, and what is decoded is
read as a program would: the share that is JSON and fits --schema (the arguments of a call: the tool's own parameters),
and how often calls, and whole outputs, are those of full retention.

With --gate STRATEGY:SCORE=WORSE the exit code is 1 if a score of the table is worse than at full retention by more than
that: points of a share, nats of a loss. Such as `standard:F1=3`, `every:2:loss=0.05` or `bulk:calls=2`.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from skvr_dist.command import (
    Figure,
    a_path,
    add_json,
    at_least,
    exit_code_of,
    new_parser,
    parse,
    probability,
    run_command,
    share,
    write_json,
)
from skvr_dist.config.data import QUESTION_FORMATS, question_first_prob
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.data.tokenizers.base import Tokenizer
    from skvr_dist.evaluate.answers import AnswerPoint, Answers, Asked
    from skvr_dist.evaluate.intervals import Interval
    from skvr_dist.evaluate.outputs import OutputPoint
    from skvr_dist.routing import CacheStrategy

    Worse = Mapping[str, Mapping[str, float]]
    """By strategy and score: by how much it is worse than at full retention, in nats (`loss`) or points."""

PROMPTS, CODE = "prompts", "code"
QUESTIONS = (*QUESTION_FORMATS, CODE)
_FORMATS = (*QUESTIONS, "chat", PROMPTS)
_STRATEGIES = ("full", "every:2", "every:4")


class Gate(NamedTuple):
    """The most by which a score may be worse than at full retention."""

    strategy: str
    score: str
    most: float


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Ask, and print and write what came of it; returns the exit code.

    Raises:
        UserError: checkpoint or file cannot be used, or a gate is on what is not measured.
    """
    options = _options()
    named = options.strategies
    if options.gate:  # changes are over the first one
        named = list(dict.fromkeys(["full", *named, *(gate.strategy for gate in options.gate)]))

    from skvr_dist.data.tokenizers.load import load_tokenizer
    from skvr_dist.hf.convert.opened import open_model
    from skvr_dist.routing import CacheStrategy

    checkpoint = open_model(options.checkpoint)
    if checkpoint.tokenizer_file is None:
        raise UserError(f"checkpoint {checkpoint.folder} has no tokenizer to read questions with; give another one")
    tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    record = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "file": str(options.file),
        "question_first_prob": questions_first(options, checkpoint),
    }
    strategies = CacheStrategy.parse_all(
        named, checkpoint.model_config.num_hidden_layers, checkpoint.config.evaluate.profiles
    )
    measure = _measure_outputs if options.format == PROMPTS else _measure_answers
    points, worse = measure(options, checkpoint, tokenizer, strategies)
    figures = _figures(options.gate, worse)
    if options.json:
        write_json(options.json, {**record, "points": [asdict(point) for point in points]})
    for figure in figures:
        print(figure)
    return exit_code_of(figures)


def _measure_answers(
    options: argparse.Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer, strategies: Mapping[str, CacheStrategy]
) -> tuple[Sequence[AnswerPoint], Worse]:
    from skvr_dist.evaluate.answers import ALL

    asked, answers = ask(options, checkpoint, tokenizer, strategies)
    print(_table(answers.points))
    print(f"\n{options.file}: {asked.counts.in_words()}{question_place(options, checkpoint)}; {checkpoint.folder}")
    worse = {
        point.strategy: {
            name: change.mean if name == "loss" else -100 * change.mean for name, change in point.changes.items()
        }
        for point in answers.points
        if point.group == ALL
    }
    return answers.points, worse


def ask(
    options: argparse.Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer, strategies: Mapping[str, CacheStrategy]
) -> tuple[Asked, Answers]:
    """Ask the questions of a file, or the lines of a corpus.

    Args:
        options: file, format, count, decode, question_first_prob, validation_share, sequence_length and batch_size.

    Raises:
        UserError: the file is of another format, or does not fit the model.
    """
    from skvr_dist.data.finetune.chat import ChatTemplate
    from skvr_dist.data.finetune.encode import Encoder
    from skvr_dist.data.finetune.formats import read_examples
    from skvr_dist.data.prepare.corpus import open_corpus
    from skvr_dist.evaluate import completion
    from skvr_dist.evaluate.answers import Asked, Decoding, measure_answers
    from skvr_dist.evaluate.completion import asked_lines, ends_of_line, held_out_lines
    from skvr_dist.evaluate.metrics import METRICS

    first = questions_first(options, checkpoint)
    longest = checkpoint.model_config.max_position_embeddings
    length = options.sequence_length or checkpoint.config.data.sequence_length or longest
    if length > longest:
        raise UserError(
            f"--sequence-length {length} is longer than max_position_embeddings {longest}; give at most that"
        )
    decode: Decoding | None
    if options.format == CODE:
        lines = held_out_lines(open_corpus(str(options.file)), options.validation_share, options.count)
        asked = asked_lines(lines, tokenizer, length, options.decode)
        decode = Decoding(tokenizer, options.decode, completion.METRICS, ends_of_line(tokenizer))
    else:
        is_chat = options.format == "chat"
        template = ChatTemplate.of(str(checkpoint.folder), tokenizer, is_model=True) if is_chat else None
        encoder = Encoder(tokenizer, longest=length + 1, seed=0, question_first_prob=first or 0.0, template=template)
        asked = Asked.of(read_examples(options.file, options.format), encoder, options.count)
        decode = Decoding(tokenizer, options.decode, METRICS[options.format]) if options.decode else None
    answers = measure_answers(
        checkpoint.load_decoder(),
        asked,
        strategies,
        eos_id=tokenizer.eos_id,
        sequence_length=length,
        batch_size=options.batch_size,
        decode=decode,
    )
    return asked, answers


def questions_first(options: argparse.Namespace, checkpoint: Checkpoint) -> float | None:
    """Probability that a question comes before its context: as given, or as in training; None without questions.

    Raises:
        UserError: it is given where there are no questions, or training data differ in it.
    """
    given: float | None = options.question_first_prob
    if options.format not in QUESTION_FORMATS:
        if given is not None:
            raise UserError(f"--format {options.format} has no questions and contexts; leave out --question-first-prob")
        return None
    if given is not None:
        return given
    trained = checkpoint.config.data.train or {}
    return question_first_prob(trained, options.format, "say with --question-first-prob how to ask")


def question_place(options: argparse.Namespace, checkpoint: Checkpoint) -> str:
    """`questions_first` as the end of a phrase."""
    first = questions_first(options, checkpoint)
    return "" if first is None else f", questions before their contexts with probability {first:g}"


def _measure_outputs(
    options: argparse.Namespace, checkpoint: Checkpoint, tokenizer: Tokenizer, strategies: Mapping[str, CacheStrategy]
) -> tuple[Sequence[OutputPoint], Worse]:
    from skvr_dist.data.finetune.prompts import read_prompts, require_room
    from skvr_dist.evaluate.outputs import measure_outputs, stop_tokens
    from skvr_dist.evaluate.structured import Schema

    schema = None if options.schema is None else Schema.of(options.schema)
    prompts = list(islice(read_prompts(options.file, tokenizer, str(checkpoint.folder)), options.count))
    if not prompts:
        raise UserError(f"{options.file} holds no prompts; give another file")
    if schema is None and (without := [prompt for prompt in prompts if not prompt.tools]):
        raise UserError(f"{without[0].place} has no tools, whose parameters would be its schema; give --schema FILE")
    require_room(prompts, checkpoint.model_config.max_position_embeddings, options.decode)
    points = measure_outputs(
        checkpoint.load_decoder(),
        prompts,
        strategies,
        schema=schema,
        tokenizer=tokenizer,
        stop_tokens=stop_tokens(checkpoint, tokenizer),
        max_new_tokens=options.decode,
    ).points
    print(_table_of_outputs(points))
    print(f"\n{options.file}: {len(prompts):,} prompts, {options.decode} new tokens at most; {checkpoint.folder}")
    full = points[0]
    worse = {
        point.strategy: {
            "valid": 100 * (full.valid.mean - point.valid.mean),
            "calls": 100 * (1 - point.same_calls.mean),
            "texts": 100 * (1 - point.same_text.mean),
        }
        for point in points
    }
    return points, worse


def add_question_place(parser: argparse._ActionsContainer) -> None:
    """`--question-first-prob X`, for a parser or a group of one."""
    parser.add_argument(
        "--question-first-prob",
        type=probability,
        metavar="X",
        help="how often the question comes before its context (default: as in the run's own examples, or else 0.5)",
    )


def _scores(options: argparse.Namespace) -> tuple[str, ...]:
    """Names of what will be measured, as gates name it."""
    if options.format == PROMPTS:
        return "valid", "calls", "texts"
    from skvr_dist.evaluate import completion
    from skvr_dist.evaluate.answers import EXACT, LOSS
    from skvr_dist.evaluate.metrics import METRICS

    of_decoded = completion.METRICS if options.format == CODE else METRICS.get(options.format, ())
    return EXACT, LOSS, *(metric.name for metric in of_decoded if options.decode)


def _figures(gates: Sequence[Gate], worse: Worse) -> list[Figure]:
    figures = []
    for strategy, score, most in gates:
        found, unit = worse[strategy][score], "nats per token" if score == "loss" else "points"
        what = f"{score} at {strategy} is worse than at full retention by {found:+.4g} {unit}"
        figures.append(Figure(what, f"<= {most:g}", found <= most))
    return figures


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=a_path, metavar="MODEL")
    parser.add_argument("file", type=a_path, metavar="FILE", help="of examples (docs/finetuning.md)")
    parser.add_argument("--format", default="examples", choices=_FORMATS, help="of the file (default: examples)")
    parser.add_argument("--strategies", nargs="+", default=_STRATEGIES, metavar="S", help="cache strategies")
    parser.add_argument("--count", type=at_least(1), default=500, metavar="N", help="examples (default: the first 500)")
    add_question_place(parser)
    parser.add_argument("--decode", type=at_least(1, 10**5), metavar="N", help="decode and score N tokens at most")
    parser.add_argument("--schema", type=a_path, metavar="FILE", help="JSON schema of what follows prompts")
    parser.add_argument(
        "--validation-share", type=share, default=0.05, metavar="X", help="code: of the corpus (default: 0.05)"
    )
    parser.add_argument(
        "--sequence-length", type=at_least(1, 10**8), metavar="N", help="tokens of an example (default: the run's)"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences at a time (default: 8)")
    parser.add_argument(
        "--gate",
        action="append",
        type=_gate,
        default=[],
        metavar="S:SCORE=WORSE",
        help="most by which a score may be worse than at full retention",
    )
    add_json(parser)
    options = parse(parser)
    if options.schema is not None and options.format != PROMPTS:
        raise UserError(f"--schema judges what is decoded after prompts; leave it out with --format {options.format}")
    if options.format in (PROMPTS, CODE) and not options.decode:
        raise UserError(f"--format {options.format} judges what is decoded; give --decode N, the most tokens of it")
    if options.decode and options.format == "chat":
        raise UserError("--decode needs one answer per example, but chats have several; leave it out")
    scores = _scores(options)
    if unknown := next((gate for gate in options.gate if gate.score not in scores), None):
        name = f"--gate {unknown.strategy}:{unknown.score}"
        raise UserError(f"{name} is on no score that is measured; name one of {', '.join(scores)}")
    return options


def _gate(text: str) -> Gate:
    """An argparse type."""
    name, _, most = text.rpartition("=")
    strategy, _, score = name.rpartition(":")
    try:
        bound = float(most)
    except ValueError:
        bound = math.nan
    if not (strategy and score and math.isfinite(bound)):
        raise argparse.ArgumentTypeError(f"{text!r} is no gate; write STRATEGY:SCORE=WORSE, such as every:2:loss=0.05")
    return Gate(strategy, score, bound)


def _table(points: Sequence[AnswerPoint]) -> str:
    from tabulate import tabulate

    first, shown = points[0].strategy, points[0].scores
    header = ["strategy", "retention", "group", "answers"]
    for name in shown:
        header += [name, f"change over {first}"]
    rows = []
    for point in points:
        row = [point.strategy, f"{100 * point.retention:.3g}%", point.group, str(point.answers)]
        for name, score in point.scores.items():
            row += [_number(name, score.mean), "" if point.strategy == first else _change(name, point.changes[name])]
        rows.append(row)
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def _table_of_outputs(points: Sequence[OutputPoint]) -> str:
    from tabulate import tabulate

    rows = [
        [
            point.strategy,
            f"{100 * point.retention:.3g}%",
            str(point.prompts),
            *(_share(each) for each in (point.valid, point.same_calls, point.same_text)),
        ]
        for point in points
    ]
    header = ["strategy", "retention", "prompts", "valid", "calls as at full", "texts as at full"]
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def _share(found: Interval) -> str:
    """A share in per cent with its interval."""
    mean, low, high = (f"{100 * value:.1f}" for value in found)
    return "n/a" if math.isnan(found.mean) else f"{mean} ({low} to {high})"


def _number(name: str, value: float) -> str:
    """A loss in nats, other scores in per cent, as their benchmarks give them."""
    if math.isnan(value):
        return "n/a"
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.1f}"


def _change(name: str, change: Interval) -> str:
    digits, unit = (4, 1) if name == "loss" else (1, 100)
    mean, low, high = (f"{unit * value:+.{digits}f}" for value in change)
    return "n/a" if math.isnan(change.mean) else f"{mean} ({low} to {high})"


if __name__ == "__main__":
    main()
