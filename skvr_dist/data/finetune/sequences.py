"""Sequences for fine-tuning, with loss on the answers only.

An example becomes one document: what is read, the answer, end-of-sequence token. Whole examples are packed into
sequences, so nothing is padded but what is left at the end of a sequence, which holds end-of-sequence tokens without
loss. Each position attends to its own example.

The packing is done once, from the lengths; every epoch runs all sequences in an order of its own. So sequence n is a
pure function of n, and `MicroBatchReader` reads these like any others.

Shapes: S sequence length.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np

from skvr_dist.config.data import HeldOutConfig
from skvr_dist.data.batch import IGNORED
from skvr_dist.data.finetune.chat import ChatTemplate
from skvr_dist.data.finetune.encode import Counts, Encoder
from skvr_dist.data.finetune.formats import read_examples
from skvr_dist.data.finetune.store import EncodedSet, kept_set
from skvr_dist.data.order import ROW_ORDER, permutation
from skvr_dist.data.reader import Rows
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import local_path

PASSAGE_ORDERS = 3
"""Orders of its passages in which an example of HotpotQA is trained on (arXiv 2604.22782, section 4.2)."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the things that share a bin of `capacity`: best fit, the longest first.

    Best fit decreasing needs at most 11/9 of the fewest bins possible (Johnson et al., SIAM J. Comput. 3, 1974).
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # bins by the room that they have left
    rooms: list[int] = []  # those that some bin has, sorted
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        at = bisect.bisect_left(rooms, lengths[number])
        if at < len(rooms):
            room = rooms[at]
            place = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        else:
            room, place = capacity, len(bins)
            bins.append([])
        bins[place].append(number)
        left = room - lengths[number]
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(place)
    return bins


class FinetuneSequences:
    """Every sequence of a set of examples by its number, epoch after epoch.

    Args:
        examples: none longer than S + 1 tokens: the last one is only predicted.
        location: where they are from, for messages.
        sequence_length: S.
        eos_id: fills the rest of a sequence.
        seed: draws the order of each epoch; None keeps the order of packing.

    Raises:
        UserError: there is none.
    """

    lanes = 0
    """Fits any batch: 0 is a multiple of every size."""

    def __init__(
        self,
        examples: EncodedSet,
        *,
        location: str,
        sequence_length: int,
        eos_id: int,
        seed: int | None,
    ) -> None:
        self.location, self.sequence_length, self.examples = location, sequence_length, examples
        self._eos_id, self._seed = eos_id, seed
        if not len(examples.ends):
            without = examples.counts.without_answer
            left = f" ({without} records in it have no answer)" if without else ""
            raise UserError(f"{location} holds no examples{left}; give a file with at least one")
        # The last token of an example is only predicted, never read.
        self.rows = pack([length - 1 for length in examples.lengths()], sequence_length)
        self._epoch, self._order = -1, np.arange(len(self.rows))

    @classmethod
    def open(
        cls,
        source: HeldOutConfig,
        tokenizer: Tokenizer,
        *,
        tokenizer_path: str,
        sequence_length: int,
        seed: int | None,
        cache: str | None = None,
    ) -> FinetuneSequences:
        """The sequences of a file of examples.

        Args:
            tokenizer_path: `data.tokenizer`, beside which chats have their template.
            seed: of orders, and of what is drawn for the examples; None for held-out data, where examples of several
                passages come once, as in the file, and what is drawn is the same for every run.
            cache: folder that keeps the tokens; None keeps none.

        Raises:
            UserError: the file cannot be read or is of another format, or an example does not fit.
        """
        encoder = Encoder(
            tokenizer,
            longest=sequence_length + 1,
            seed=seed or 0,
            question_first_prob=source.question_first_prob,
            passage_orders=PASSAGE_ORDERS if source.format == "hotpotqa" and seed is not None else 0,
            template=ChatTemplate.of(tokenizer_path, tokenizer) if source.format == "chat" else None,
        )

        def encoded() -> EncodedSet:
            counts = Counts()
            return EncodedSet.of(encoder.encode_all(read_examples(source.path, source.format), counts), counts)

        facts = {"format": source.format, **encoder.facts()}
        examples = kept_set(cache, facts, local_path(source.path), encoded) if cache else encoded()
        return cls(examples, location=source.path, sequence_length=sequence_length, eos_id=tokenizer.eos_id, seed=seed)

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return len(self.examples.tokens)

    @property
    def fingerprint(self) -> str:
        """Equal for two sets of the same examples, as they were drawn and cut."""
        return self.examples.fingerprint

    def in_words(self) -> str:
        """What became of the file, in words."""
        became = self.examples.counts.in_words()
        return f"{became}, packed into {len(self.rows):,} sequences of {self.sequence_length:,} tokens"

    def read(self, first: int, size: int) -> Rows:
        """Sequences `first` to `first + size - 1`; a document is an example or the rest of a sequence."""
        shape = (size, self.sequence_length)
        tokens = np.full(shape, self._eos_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        documents = np.zeros(shape, dtype=np.int64)
        for row in range(size):
            packed = self.rows[self._row_at(first + row)]
            start = 0
            for document, number in enumerate(packed):
                example, predicted = self.examples.example(number)
                stop = start + len(example) - 1
                tokens[row, start:stop] = example[:-1]
                labels[row, start:stop] = np.where(predicted[1:], example[1:].astype(np.int64), IGNORED)
                documents[row, start:stop] = document
                start = stop
            documents[row, start:] = len(packed)
        return Rows(tokens, labels, documents)

    def _row_at(self, number: int) -> int:
        """The row that is sequence `number`."""
        epoch, place = divmod(number, len(self.rows))
        if self._seed is None:
            return place
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._seed, ROW_ORDER, epoch, 0, len(self.rows))
        return int(self._order[place])


def sources_in_words(sources: dict[str, Any]) -> list[str]:
    """What became of the files of examples among sources, a sentence each."""
    return [f"{name}: {source.in_words()}" for name, source in sources.items() if isinstance(source, FinetuneSequences)]
