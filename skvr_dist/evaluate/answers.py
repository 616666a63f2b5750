"""How many answers a checkpoint gets right at each cache strategy.

Shapes: B rows, S sequence length, V vocabulary.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.finetune.encode import Counts, Encoded, Encoder
from skvr_dist.data.finetune.examples import Chat, QuestionAnswer
from skvr_dist.data.finetune.sequences import FinetuneSequences
from skvr_dist.data.finetune.store import EncodedSet
from skvr_dist.errors import UserError
from skvr_dist.evaluate.generate import generate
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

ALL = "all"
"""The group of all answers."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


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
    f1: float | None = None
    """Mean over what greedy decoding gives, as SQuAD counts it; None where nothing was decoded."""


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
) -> list[AnswerPoint]:
    """The answers at each strategy, all of them and by group.

    Args:
        sequence_length: S that examples are packed into.
        batch_size: B.
        decode: how to decode answers for F1; None decodes none.
    """
    sequences = FinetuneSequences(
        EncodedSet.of(asked.encoded, asked.counts),
        location="examples",
        sequence_length=sequence_length,
        eos_id=eos_id,
        seed=None,
    )
    points = []
    for name, strategy in strategies.items():
        right, loss, tokens = _forced(decoder, sequences, strategy, len(asked.encoded), batch_size)
        scores = decode.scores(decoder, asked, strategy, eos_id) if decode else None
        for group, numbers in asked.groups().items():
            points.append(
                AnswerPoint(
                    strategy=name,
                    retention=strategy.retention,
                    group=group,
                    answers=len(numbers),
                    exact=float(right[numbers].float().mean()),
                    loss=float(loss[numbers].sum() / tokens[numbers].sum()),
                    f1=None if scores is None else sum(scores[number] for number in numbers) / len(numbers),
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


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded: greedily, with a cache of the retained layers alone."""

    encoder: Encoder
    max_new_tokens: int

    def scores(self, decoder: Decoder, asked: Asked, strategy: CacheStrategy, eos_id: int) -> list[float]:
        """F1 of what is decoded for each example, the best over all its answers."""
        device = next(decoder.parameters()).device
        found = []
        for example, encoded in zip(asked.examples, asked.encoded, strict=True):
            assert isinstance(example, QuestionAnswer)
            prompt = torch.from_numpy(encoded.tokens[~encoded.predicted].astype("int64")).to(device)
            new, _ = generate(decoder, prompt, strategy, max_new_tokens=self.max_new_tokens, stop_token=eos_id)
            tokenizer = self.encoder.tokenizer
            text = tokenizer.decode([token for token in new.tolist() if token < tokenizer.vocab_size])
            found.append(max(f1(text, answer) for answer in (example.answer, *example.others)))
        return found


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of an answer's words, as SQuAD's evaluation script has it.

    Case, punctuation and English articles do not count.
    """
    words, wanted = _words(text), _words(answer)
    if not words or not wanted:
        return float(words == wanted)
    same = sum((Counter(words) & Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted))


def _words(text: str) -> Sequence[str]:
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()
