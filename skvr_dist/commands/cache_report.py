"""The part of `skvr-report` that reports on one model's caches."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from skvr_dist.command import typed_command
from skvr_dist.commands.estimate.serve import BLOCK, OTHER_GIB, UTILIZATION
from skvr_dist.errors import UserError
from skvr_dist.files import as_json, write_whole

if TYPE_CHECKING:
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.evaluate.cache_report.content import CacheReport, Memory
    from skvr_dist.evaluate.curve import HeldOutData, Measurement
    from skvr_dist.routing import CacheStrategy

_GIB = 2**30
_SHARES = [Fraction(eighths, 8) for eighths in range(1, 8)]
"""Of the layers, in each family: close enough that one of them is near the smallest cache within the bound."""


def write_cache_report(options: argparse.Namespace, output: Path) -> Path:
    """Measure a model's caches and write report.md, report.html and report.json; returns the path of the first.

    Raises:
        UserError: the model, its data or the work cannot be used.
    """
    from skvr_dist.commands.answers import ask, question_place
    from skvr_dist.commands.retention import FAMILIES, of_families
    from skvr_dist.data.tokenizers.load import load_tokenizer
    from skvr_dist.evaluate.cache_report import content
    from skvr_dist.evaluate.curve import HeldOutData
    from skvr_dist.evaluate.outputs import FULL
    from skvr_dist.evaluate.replay.report import read_report
    from skvr_dist.hf.convert.opened import open_model
    from skvr_dist.routing import CacheStrategy
    from skvr_dist.sweep.results import source_commit

    checkpoint = open_model(options.model)
    if checkpoint.tokenizer_file is None:
        raise UserError(f"model {checkpoint.folder} has no tokenizer to write texts with; give another one")
    replayed = None if options.replay is None else read_report(options.replay)
    tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    _add_plan(checkpoint)
    layers, profiles = checkpoint.model_config.num_hidden_layers, checkpoint.config.evaluate.profiles
    context = _context(checkpoint, options.context)
    held_out = HeldOutData.of(checkpoint, options.data, options.sequence_length)
    names = options.strategies or [*of_families(FAMILIES, layers, _SHARES), *profiles]
    strategies = CacheStrategy.parse_all(list(dict.fromkeys([FULL, *names])), layers, profiles)
    measurement = _measured(options, checkpoint, held_out, list(strategies))
    recommended = content.recommended_point(measurement.points, options.most_rise)
    chosen = {name: strategies[name] for name in content.shown_strategies(measurement.points, recommended)}
    if options.file:
        asked, answers = ask(options, checkpoint, tokenizer, {FULL: strategies[FULL], **chosen})
        (cases, compared), scores = content.answered(asked, answers), content.totals(answers)
        work = f"{options.file}, {options.format}{question_place(options, checkpoint)}"
    else:
        batches = held_out.batches(options.sequences, options.batch_size, "cpu")
        cases, compared = content.continued(checkpoint.load_decoder(), batches, chosen, tokenizer)
        scores, work = [], "continuations of held-out text"
    report = content.CacheReport(
        model=content.name_of(checkpoint),
        layers=layers,
        most_rise=options.most_rise,
        measurement=measurement,
        retained={name: strategy.retained for name, strategy in strategies.items()},
        recommended=recommended,
        families=content.by_family(measurement.points, profiles),
        memory=_memory(checkpoint, options.memory_gib, context, _one_of_each_size(strategies, recommended.strategy)),
        server=f"a GPU of {options.memory_gib:g} GiB with contexts of {context:,} tokens",
        work=work,
        scores=scores,
        cases=cases,
        compared=compared,
        replayed=replayed,
        command=typed_command(),
        commit=source_commit(),
    )
    return _write(report, output)


def _measured(
    options: argparse.Namespace, checkpoint: Checkpoint, held_out: HeldOutData, strategies: list[str]
) -> Measurement:
    """The curve of the strategies, of which full retention is the first."""
    from skvr_dist.evaluate.curve import evaluate_checkpoint, require_losses

    found = evaluate_checkpoint(
        checkpoint, held_out, strategies, sequences=options.sequences, batch_size=options.batch_size
    )
    require_losses(checkpoint, {strategies[0]: found.points[0].loss})
    return found


def _write(report: CacheReport, output: Path) -> Path:
    """All forms of the report; returns the path of the Markdown."""
    from skvr_dist.evaluate.cache_report.markdown import as_markdown
    from skvr_dist.evaluate.cache_report.page import as_page

    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / "report.json", as_json(report, indent=2) + "\n")
    write_whole(output / "report.html", as_page(report))
    write_whole(output / "report.md", as_markdown(report))
    return output / "report.md"


def _add_plan(checkpoint: Checkpoint) -> None:
    """Name the strategies of a model's plan as profiles, where it has one, as an export carries them."""
    from skvr_dist.evaluate.cache_plan import profiles_of

    profiles = profiles_of(checkpoint.folder, checkpoint.config.evaluate.profiles)
    evaluate = checkpoint.config.evaluate.model_copy(update={"profiles": profiles})
    checkpoint.config = checkpoint.config.model_copy(update={"evaluate": evaluate})


def _context(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens of a sequence on the server; raises `UserError` before anything is measured if the model reads fewer."""
    longest = checkpoint.model_config.max_position_embeddings
    if asked is not None and asked > longest:
        raise UserError(f"--context {asked} is more than max_position_embeddings {longest}; give at most that")
    return asked or longest


def _one_of_each_size(strategies: dict[str, CacheStrategy], first: str) -> dict[str, CacheStrategy]:
    """Strategies of as many layers take the same memory: one for each number, the largest first."""
    sizes = {len(strategies[name].retained): name for name in [*reversed(strategies), first]}
    return {sizes[size]: strategies[sizes[size]] for size in sorted(sizes, reverse=True)}


def _memory(
    checkpoint: Checkpoint, memory_gib: float, context: int, strategies: dict[str, CacheStrategy]
) -> list[Memory]:
    """What fits at one strategy of each size, in bf16."""
    from skvr_dist.evaluate.cache_report.content import Memory
    from skvr_dist.lab.estimate.serve import BYTES, Server, fit_strategies

    server = Server(
        memory=int(memory_gib * UTILIZATION * _GIB),
        other=int(OTHER_GIB * _GIB),
        context=context,
        weight_bytes=BYTES["bfloat16"],
        cache_bytes=BYTES["bfloat16"],
        block=BLOCK,
    )
    fits = fit_strategies(checkpoint.model_config, server, strategies)
    return [Memory(fit.name, fit.weights, fit.cache_bytes_per_token, fit.sequences) for fit in fits]
