"""Sequences for fine-tuning on questions about a context, with loss on the answers only.

An example becomes one document: prompt, answer, end-of-sequence token. Whole examples are packed into sequences, so
nothing is padded but what is left at the end of a sequence, which holds end-of-sequence tokens without loss. Each
position attends to its own example.

The packing is done once, from the lengths; every epoch runs all sequences in an order of its own. So sequence n is a
pure function of n, and `MicroBatchReader` reads these like any others.

Shapes: S sequence length.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.order import ROW_ORDER, permutation
from skvr_dist.data.prepare.formats import HALF_A_PAIR, parse_json, read_lines
from skvr_dist.data.reader import Rows
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import local_path

PROMPT = "{context}\n\nQuestion: {question}\nAnswer:"
"""Text before an example's answer, which follows after a space."""


class QuestionAnswer(NamedTuple):
    """An example."""

    context: str
    question: str
    answer: str


class Encoded(NamedTuple):
    """An example as token ids."""

    tokens: NDArray[np.int64]
    """Prompt, answer and end-of-sequence token."""
    prompt_tokens: int


def read_examples(path: str | Path) -> Iterator[QuestionAnswer]:
    """Examples from a jsonl file, compressed or not, whose lines hold the keys context, question and answer.

    Raises:
        UserError: the file cannot be read, or a line is not such an example.
    """
    for number, line in enumerate(read_lines(local_path(path)), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            texts = [record[key] for key in QuestionAnswer._fields]
            if not (all(isinstance(text, str) for text in texts) and texts[1] and texts[2]):
                raise TypeError
            "".join(texts).encode()
        except (ValueError, KeyError, TypeError) as error:
            why = f" ({HALF_A_PAIR})" if isinstance(error, UnicodeEncodeError) else ""
            raise UserError(
                f"{path}, line {number} is no example{why}; it needs the keys context, question and answer, each "
                f"a text, the last two not empty"
            ) from None
        yield QuestionAnswer(*texts)


def encode_example(example: QuestionAnswer, tokenizer: Tokenizer) -> Encoded:
    """Encode prompt and answer separately, so that the loss begins exactly where the answer does."""
    prompt = tokenizer.encode(PROMPT.format(context=example.context, question=example.question))
    answer = tokenizer.encode(f" {example.answer}")
    return Encoded(np.array([*prompt, *answer, tokenizer.eos_id]), len(prompt))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the things that share a bin of `capacity`: best fit, the longest first.

    Best fit decreasing needs at most 11/9 of the fewest bins possible (Johnson et al., SIAM J. Comput. 3, 1974).
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        at = bisect.bisect_left(free, (lengths[number], -1))
        if at < len(free):
            room, place = free.pop(at)
        else:
            room, place = capacity, len(bins)
            bins.append([])
        bins[place].append(number)
        bisect.insort(free, (room - lengths[number], place))
    return bins


class FinetuneSequences:
    """Every sequence of a fine-tuning run by its number.

    Args:
        examples: all of them; they are held in memory as tokens.
        sequence_length: S; the last token of a sequence predicts nothing, so an example may have S + 1 tokens.
        seed: draws the order of each epoch.

    Raises:
        UserError: an example is longer than a sequence, or there is none.
    """

    lanes = 0
    """Fits any batch: 0 is a multiple of every size."""

    def __init__(
        self, examples: Iterable[QuestionAnswer], tokenizer: Tokenizer, *, sequence_length: int, seed: int
    ) -> None:
        self.sequence_length = sequence_length
        self._examples = [encode_example(example, tokenizer) for example in examples]
        self._eos_id = tokenizer.eos_id
        self._seed = seed
        if not self._examples:
            raise UserError("there are no examples to fine-tune on; give a file with at least one")
        # The end-of-sequence token of an example is only predicted, never read.
        lengths = [len(example.tokens) - 1 for example in self._examples]
        longest = int(np.argmax(lengths))
        if lengths[longest] > sequence_length:
            raise UserError(
                f"example {longest + 1} has {lengths[longest]} tokens, more than data.sequence_length "
                f"{sequence_length}; shorten its context or raise the sequence length"
            )
        self.rows = pack(lengths, sequence_length)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def read(self, first: int, size: int) -> Rows:
        """Sequences `first` to `first + size - 1`; a document is an example or the rest of a sequence."""
        shape = (size, self.sequence_length)
        tokens = np.full(shape, self._eos_id)
        labels = np.full(shape, IGNORED)
        documents = np.zeros(shape, dtype=np.int64)
        for row in range(size):
            epoch, place = divmod(first + row, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(self._seed, ROW_ORDER, epoch, 0, len(self.rows))
            packed = self.rows[self._order[place]]
            start = 0
            for document, number in enumerate(packed):
                example = self._examples[number]
                stop = start + len(example.tokens) - 1
                tokens[row, start:stop] = example.tokens[:-1]
                labels[row, start + example.prompt_tokens - 1 : stop] = example.tokens[example.prompt_tokens :]
                documents[row, start:stop] = document
                start = stop
            documents[row, start:] = len(packed)
        return Rows(tokens, labels, documents)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the sequences."""
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(example.tokens.tobytes() + bytes(str(example.prompt_tokens), "ascii"))
        return {
            "order": 1,
            "sequence_length": self.sequence_length,
            "seed": self._seed,
            "examples": digest.hexdigest()[:16],
        }
