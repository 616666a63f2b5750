"""What the report on a model's caches says: quality against bytes, a recommendation, and where it fails.

The recommendation is the smallest cache whose cost has an interval below what the reader would pay. Texts that change
are ranked by `change`: 1 less twice the characters that both texts have in the same order over those of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.evaluate.answers import ALL, AnswerPoint, Answers, Asked
from skvr_dist.evaluate.curve import Measurement
from skvr_dist.evaluate.generate import decode_all
from skvr_dist.evaluate.metrics import similarity
from skvr_dist.evaluate.outputs import FULL
from skvr_dist.evaluate.replay.report import ReplayReport
from skvr_dist.evaluate.retention import RetentionPoint
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

PLANNED = "planned"
_CONTINUED, _PROMPT_TOKENS, _NEW_TOKENS = 16, 96, 32
SHOWN = 5
"""Texts, for each strategy."""


@dataclass(frozen=True)
class Case:
    """A text that changes with the cache."""

    prompt: str
    """The end of what is read before it."""
    at_full: str
    at_smaller: str
    change: float
    """From 0, no change, to 1."""
    right: str | None = None
    """The right answer, where there is one."""


@dataclass(frozen=True)
class Memory:
    """What a server holds at a strategy."""

    strategy: str
    weights: int
    """Bytes."""
    cache_bytes_per_token: int
    sequences: int
    """Of the whole context, at once."""


@dataclass(frozen=True)
class CacheReport:
    """Everything that both forms of the report show."""

    model: str
    layers: int
    most_rise: float
    """Nats per token over full retention that the reader would pay."""
    measurement: Measurement
    retained: dict[str, tuple[int, ...]]
    """Layers that keep a cache, by strategy."""
    recommended: RetentionPoint
    families: dict[str, list[RetentionPoint]]
    """By family, the largest cache first; full retention is the first point of each."""
    memory: list[Memory]
    server: str
    """The GPU and the context that memory is counted for, in words."""
    work: str
    """What the cases are from, in words."""
    scores: list[AnswerPoint]
    """Of that work at each strategy that was asked, if it has right answers."""
    cases: dict[str, list[Case]]
    """The texts that change most, by strategy."""
    compared: int
    """Texts that the cases are chosen from."""
    replayed: ReplayReport | None
    """A workload under load, if one was replayed."""
    command: str
    """That made the report."""
    commit: str | None
    """Of the code; None for an installed release."""


def recommended_point(points: Sequence[RetentionPoint], most_rise: float) -> RetentionPoint:
    """The smallest cache whose rise has an interval that ends below `most_rise`; of equal sizes the lowest loss."""
    allowed = [point for point in points if point.rise and point.rise.high <= most_rise] or [points[0]]
    return min(allowed, key=lambda point: (point.retained, point.loss))


def by_family(points: Sequence[RetentionPoint], profiles: Mapping[str, str]) -> dict[str, list[RetentionPoint]]:
    """The points of each family of strategies, the profiles of a plan as one, each from full retention on."""
    full = points[0]
    families: dict[str, list[RetentionPoint]] = {}
    for point in points[1:]:
        family = PLANNED if point.strategy in profiles else point.strategy.partition(":")[0]
        families.setdefault(family, [full]).append(point)
    return {name: sorted(of, key=lambda point: -point.retained) for name, of in families.items()}


def shown_strategies(points: Sequence[RetentionPoint], recommended: RetentionPoint) -> list[str]:
    """The strategies whose texts are compared with full retention's: the recommended one, and the smallest cache."""
    smallest = min(points, key=lambda point: (point.retained, point.loss))
    return list(dict.fromkeys(p.strategy for p in (recommended, smallest) if p.strategy != points[0].strategy))


def change(one: str, other: str) -> float:
    """How much of two texts is not the same, from 0 to 1."""
    return 0.0 if one == other else 1 - similarity(one, other)


def continued(
    decoder: Decoder, batches: Sequence[MicroBatch], strategies: Mapping[str, CacheStrategy], tokenizer: Tokenizer
) -> tuple[dict[str, list[Case]], int]:
    """Held-out text, continued at full retention and at each strategy; the cases, and how many texts there were."""
    rows = torch.cat([batch.tokens.cpu() for batch in batches])[:_CONTINUED]
    prompts = list(rows[:, : min(_PROMPT_TOKENS, max(1, rows.shape[1] - _NEW_TOKENS))])
    every = {FULL: CacheStrategy.full(decoder.config.num_hidden_layers), **strategies}
    texts = {
        name: decode_all(
            decoder,
            prompts,
            strategy,
            tokenizer,
            max_new_tokens=_NEW_TOKENS,
            stop_tokens=[tokenizer.eos_id],
            name=name,
        )
        for name, strategy in every.items()
    }
    shown = [tokenizer.decode(prompt.tolist()) for prompt in prompts]
    return {name: _ranked(shown, texts[FULL], texts[name], None) for name in strategies}, len(prompts)


def answered(asked: Asked, answers: Answers) -> tuple[dict[str, list[Case]], int]:
    """The cases of questions that were asked, the first strategy being full retention."""
    first, *others = answers.texts
    prompts = [getattr(example, "question", "") for example in asked.examples]
    right = [getattr(example, "answer", "") for example in asked.examples]
    cases = {name: _ranked(prompts, answers.texts[first], answers.texts[name], right) for name in others}
    return cases, len(prompts)


def totals(answers: Answers) -> list[AnswerPoint]:
    """The points over all answers."""
    return [point for point in answers.points if point.group == ALL]


def _ranked(
    prompts: Sequence[str], full: Sequence[str], less: Sequence[str], right: Sequence[str] | None
) -> list[Case]:
    """Those that change most, the most changed first."""
    answers: Sequence[str | None] = right or [None] * len(prompts)
    texts = zip(prompts, full, less, answers, strict=True)
    cases = [Case(prompt, one, other, change(one, other), answer) for prompt, one, other, answer in texts]
    return [case for case in sorted(cases, key=lambda case: -case.change) if case.change > 0][:SHOWN]


def sentences(report: CacheReport) -> list[str]:
    """The recommendation, in the first lines of both forms."""
    point, full = report.recommended, report.measurement.points[0]
    layers = ", ".join(map(str, report.retained[point.strategy]))
    measured = f"{report.measurement.tokens:,} held-out tokens"
    if point.strategy == full.strategy:
        return [
            f"Keep the cache of all {report.layers} layers: every smaller cache that was measured may cost more than "
            f"{report.most_rise:g} nats per token ({measured})."
        ]
    assert point.rise is not None
    found = [
        f"Keep the cache of {point.retained} of {report.layers} layers: {layers} (`{point.strategy}`).",
        f"That is {point.cache_bytes_per_token:,} bytes per token instead of {full.cache_bytes_per_token:,}, and costs "
        f"{point.rise.mean:+.4f} nats per token ({point.rise.low:+.4f} to {point.rise.high:+.4f}, {measured}), below "
        f"the {report.most_rise:g} that were allowed.",
    ]
    held = {memory.strategy: memory for memory in report.memory}
    mine, fulls = held.get(point.strategy), held.get(full.strategy)
    if mine and fulls:
        found.append(f"On {report.server} that holds {mine.sequences:,} sequences at once, not {fulls.sequences:,}.")
    if smaller := next_smaller(report.measurement.points, point):
        assert smaller.rise is not None
        kept = ", ".join(map(str, report.retained[smaller.strategy]))
        found.append(f"The next smaller one ({kept}: `{smaller.strategy}`) costs {smaller.rise.mean:+.4f}.")
    return [*found, f"Exports serve it with `kv_profile={point.strategy}`."]


def next_smaller(points: Sequence[RetentionPoint], chosen: RetentionPoint) -> RetentionPoint | None:
    """The best of the largest caches that are smaller than the chosen one; None below the smallest."""
    return min(
        (point for point in points if point.rise and point.retained < chosen.retained),
        key=lambda point: (-point.retained, point.loss),
        default=None,
    )


def origin(report: CacheReport) -> str:
    """The last sentence of both forms: how to make the report again."""
    measured, code = report.measurement, ""
    if report.commit:
        changed = ", with changes that were not committed" if report.commit.endswith("+") else ""
        code = f" at commit {report.commit[:7]}{changed}"
    return (
        f"Measured over {measured.sequences:,} sequences of {measured.sequence_length:,} tokens from "
        f"{measured.data} ({measured.data_fingerprint}). Made by `{report.command}`{code}."
    )


def name_of(checkpoint: Checkpoint) -> str:
    """A checkpoint for the title."""
    folder = checkpoint.folder
    return folder.parents[1].name if folder.parent.name == "checkpoints" else folder.name
