"""How many answers a checkpoint gets right at each cache strategy.

Shapes: B rows, S sequence length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.finetune.encode import Counts, Encoded, Encoder
from skvr_dist.data.finetune.examples import Chat, QuestionAnswer
from skvr_dist.data.finetune.sequences import FinetuneSequences
from skvr_dist.data.finetune.store import EncodedSet
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.generate import decode_all
from skvr_dist.evaluate.intervals import AnswerBootstrap, Interval
from skvr_dist.evaluate.metrics import Metric
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

ALL = "all"
"""The group of all answers."""
EXACT, LOSS = "exact", "loss"


@dataclass(frozen=True)
class AnswerPoint:
    """The answers of a group at a cache strategy."""

    strategy: str
    retention: float
    group: str
    answers: int
    exact: float
    """Share of the answers all of whose tokens, the end too, are the likeliest ones: greedy decoding gives them."""
    loss: float
    """Nats per token of the answers."""
    scores: dict[str, Interval]
    """Those two with their intervals, and the scores of what was decoded."""
    changes: dict[str, Interval]
    """Of these scores over those of the first strategy, whose documents are drawn alike."""


@dataclass(frozen=True)
class Answers:
    """The answers to the same questions at several strategies."""

    points: list[AnswerPoint]
    """Of each strategy all answers, then its groups."""
    texts: dict[str, list[str]]
    """What was decoded for each question, by strategy."""
    right: dict[str, NDArray[np.bool_]]
    """Whether greedy decoding gives the answer to its last token, by strategy."""


@dataclass(frozen=True)
class Asked:
    """Examples and their tokens."""

    examples: list[QuestionAnswer | Chat]
    encoded: list[Encoded]
    counts: Counts

    @classmethod
    def of(cls, examples: Iterable[QuestionAnswer | Chat | None], encoder: Encoder, most: int) -> Asked:
        """The first `most` examples that have answers.

        Raises:
            UserError: there is none, or one does not fit.
        """
        asked = cls([], [], Counts())
        for number, example in enumerate(examples):
            if len(asked.encoded) >= most:
                break
            for encoded in encoder.encode(example, number, asked.counts) if example is not None else ():
                assert example is not None
                asked.examples.append(example)
                asked.encoded.append(encoded)
        if not asked.encoded:
            raise UserError("the file holds no examples with answers; give another one")
        return asked

    def groups(self) -> dict[str, list[int]]:
        """Numbers of the examples by their group, all of them first."""
        found: dict[str, list[int]] = {}
        for number, example in enumerate(self.examples):
            group = example.group if isinstance(example, QuestionAnswer) else ""
            found.setdefault(group, []).append(number)
        every = {ALL: list(range(len(self.examples)))}
        return every if list(found) == [""] else {**every, **dict(sorted(found.items()))}

    def documents(self) -> list[tuple[object, ...]]:
        """What each example belongs to: questions about one context belong together."""
        return [
            example.passages if isinstance(example, QuestionAnswer) and example.passages else (number,)
            for number, example in enumerate(self.examples)
        ]

    def prompts(self) -> list[torch.Tensor]:
        """What is read before each answer, int64 [S]; of examples with one answer."""
        return [torch.from_numpy(encoded.tokens[~encoded.predicted].astype("int64")) for encoded in self.encoded]


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedily, with a cache of the retained layers alone."""

    tokenizer: Tokenizer
    max_new_tokens: int
    metrics: Sequence[Metric]
    """That score what is decoded."""
    last_tokens: Collection[int] = ()
    """After which an answer is over, beside the end-of-sequence token."""


_FORCED = (Metric(EXACT, lambda *_: ()), Metric(LOSS, lambda *_: ()))
"""Means of what needs no decoding, whose counts are at hand."""


@torch.inference_mode()
def measure_answers(
    decoder: Decoder,
    asked: Asked,
    strategies: Mapping[str, CacheStrategy],
    *,
    eos_id: int,
    sequence_length: int,
    batch_size: int,
    decode: Decoding | None = None,
) -> Answers:
    """The answers at each strategy, all of them and by group.

    Args:
        strategies: the first one is what the others' changes are measured against.
        sequence_length: S that examples are packed into.
        batch_size: B.
        decode: how to decode answers and score them; None decodes none.
    """
    sequences = FinetuneSequences(
        EncodedSet.of(asked.encoded, asked.counts),
        location="examples",
        sequence_length=sequence_length,
        eos_id=eos_id,
        seed=None,
    )
    metrics = [*_FORCED, *(decode.metrics if decode else ())]
    counts: dict[str, dict[str, NDArray[np.float64]]] = {}
    texts: dict[str, list[str]] = {}
    for name, strategy in strategies.items():
        right, loss, tokens = _forced(decoder, sequences, strategy, len(asked.encoded), batch_size)
        counts[name] = {
            EXACT: np.stack([right.double(), torch.ones(len(right))], axis=1),
            LOSS: np.stack([loss, tokens.double()], axis=1),
        }
        if decode:
            texts[name] = decode_all(
                decoder,
                asked.prompts(),
                strategy,
                decode.tokenizer,
                max_new_tokens=decode.max_new_tokens,
                stop_tokens=[eos_id],
                last_tokens=decode.last_tokens,
                name=name,
            )
            counts[name] |= {metric.name: _counts(metric, texts[name], asked) for metric in decode.metrics}
    return Answers(
        points=_points(asked, strategies, metrics, counts),
        texts=texts,
        right={name: of_strategy[EXACT][:, 0] > 0 for name, of_strategy in counts.items()},
    )


def _counts(metric: Metric, texts: Sequence[str], asked: Asked) -> NDArray[np.float64]:
    """float64 [N, K]: what a metric counts of each answer."""
    found = []
    for text, example in zip(texts, asked.examples, strict=True):
        assert isinstance(example, QuestionAnswer)
        found.append(metric.count(text, example.right))
    return np.array(found)


def _points(
    asked: Asked,
    strategies: Mapping[str, CacheStrategy],
    metrics: Sequence[Metric],
    counts: Mapping[str, Mapping[str, NDArray[np.float64]]],
) -> list[AnswerPoint]:
    """A point for each strategy and group, from what each metric counts of each answer, float64 [N, K]."""
    documents, first, points = asked.documents(), next(iter(strategies)), []
    groups = {
        group: (numbers, AnswerBootstrap([documents[number] for number in numbers]))
        for group, numbers in asked.groups().items()
    }
    for name, strategy in strategies.items():
        for group, (numbers, bootstrap) in groups.items():
            scores, changes = {}, {}
            for metric in metrics:
                mine, firsts = counts[name][metric.name][numbers], counts[first][metric.name][numbers]
                scores[metric.name] = bootstrap.interval(mine, metric.value)
                changes[metric.name] = bootstrap.interval(np.concatenate([mine, firsts], axis=1), metric.change)
            points.append(
                AnswerPoint(
                    strategy=name,
                    retention=strategy.retention,
                    group=group,
                    answers=len(numbers),
                    exact=scores[EXACT].mean,
                    loss=scores[LOSS].mean,
                    scores=scores,
                    changes=changes,
                )
            )
    return points


def _forced(
    decoder: Decoder, sequences: FinetuneSequences, strategy: CacheStrategy, count: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each example whether all labels are the likeliest tokens, the sum of its losses, and its number of labels."""
    right = torch.ones(count, dtype=torch.bool)
    loss, labels_of = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    device = next(decoder.parameters()).device
    for first in range(0, len(sequences.rows), batch_size):
        rows = sequences.read(first, min(batch_size, len(sequences.rows) - first))
        tokens, labels, documents = (torch.from_numpy(array) for array in rows[:3] if array is not None)
        logits = decoder(tokens.to(device), strategy.kv_source_layers, documents=documents.to(device)).float().cpu()
        learned = labels != IGNORED
        wrong = (logits.argmax(-1) != labels) & learned
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        for row, packed in enumerate(sequences.rows[first : first + len(tokens)]):
            for document, number in enumerate(packed):
                mine = (documents[row] == document) & learned[row]
                right[number] = not bool(wrong[row][mine].any())
                loss[number], labels_of[number] = nats[row][mine].double().sum(), mine.sum()
    return right, loss, labels_of
