"""Examples as tokens: prompts, where the question stands, the order of passages, and contexts that are cut to fit.

What is drawn for an example is a pure function of the seed and its number in its file.

Shapes: n tokens of an example.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.finetune.chat import ChatTemplate
from skvr_dist.data.finetune.examples import Chat, QuestionAnswer
from skvr_dist.data.order import PASSAGE_ORDER, QUESTION_PLACE, permutation
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError

SEPARATOR = "\n\n"
"""Between the passages of a context, and between it and the question."""


class Encoded(NamedTuple):
    """An example as token ids."""

    tokens: NDArray[np.uint32]
    """[n]: what is read, the answer and the end-of-sequence token."""
    predicted: NDArray[np.bool_]
    """[n]: whether a token has loss. The first never has."""


@dataclass
class Counts:
    """What became of the records of a file."""

    examples: int = 0
    cut: int = 0
    """Examples whose context was cut to fit, or chats that lost their last turns."""
    answers_cut: int = 0
    """Those of them whose context held the answer's text before, and does not any more."""
    without_answer: int = 0
    """Records that have no answer, and are left out."""

    def in_words(self) -> str:
        """In a sentence's part: 40 examples, 3 of them cut to fit (1 of which lost the answer from its context)."""
        words = f"{self.examples:,} examples"
        if self.cut:
            words += f", {self.cut:,} of them cut to fit"
        if self.answers_cut:
            words += f" ({self.answers_cut:,} of which lost the answer's text from their context)"
        if self.without_answer:
            words += f", {self.without_answer:,} records without an answer left out"
        return words


def prompt(context: str, question: str, *, question_first: bool) -> str:
    """The text before an answer, which follows after a space."""
    parts = [context] if context else []
    if question_first:
        return SEPARATOR.join([f"Question: {question}", *parts, "Answer:"])
    return SEPARATOR.join([*parts, f"Question: {question}\nAnswer:"])


@dataclass(frozen=True)
class Encoder:
    """Turns the examples of a file into tokens.

    Args:
        tokenizer: of the run.
        longest: tokens that an example may have with its last one, which is only predicted: sequence length + 1.
        seed: of what is drawn.
        question_first_prob: probability that a question comes before its context.
        passage_orders: how often an example of several passages is given, each time in another drawn order; 0 gives it
            once, in the order of the file.
        template: what chats are written with.
    """

    tokenizer: Tokenizer
    longest: int
    seed: int
    question_first_prob: float
    passage_orders: int = 0
    template: ChatTemplate | None = None

    def facts(self) -> dict[str, Any]:
        """Everything that decides the tokens of a record."""
        return {
            "tokenizer": self.tokenizer.sha256,
            "longest": self.longest,
            "seed": self.seed,
            "question_first_prob": self.question_first_prob,
            "passage_orders": self.passage_orders,
            "template": self.template.text if self.template else "",
            "special_tokens": self.template.special_tokens if self.template else {},
        }

    def encode_all(self, examples: Iterable[QuestionAnswer | Chat | None], counts: Counts) -> Iterator[Encoded]:
        """All examples in their order; what became of them is added to `counts`.

        Raises:
            UserError: question and answer do not fit into a sequence, or a chat does not fit its template.
        """
        for number, example in enumerate(examples):
            if example is None:
                counts.without_answer += 1
            else:
                yield from self.encode(example, number, counts)

    def encode(self, example: QuestionAnswer | Chat, number: int, counts: Counts) -> Iterator[Encoded]:
        """An example as documents, one or several; raises as `encode_all` does.

        Args:
            number: of the record in its file, which decides what is drawn.
        """
        encoded = self._chat(example, counts) if isinstance(example, Chat) else self._answer(example, number, counts)
        for each in encoded:
            counts.examples += 1
            yield each

    def _chat(self, chat: Chat, counts: Counts) -> Iterator[Encoded]:
        assert self.template is not None
        for text, is_cut in self.template.fit(chat, self.longest):
            counts.cut += is_cut
            yield Encoded(*text)

    def _answer(self, example: QuestionAnswer, number: int, counts: Counts) -> Iterator[Encoded]:
        for copy in range(max(1, self.passage_orders)):
            passages = example.passages
            if self.passage_orders:
                order = permutation(self.seed, PASSAGE_ORDER, 0, number, len(passages), part=copy)
                passages = tuple(passages[place] for place in order)
            draw = np.random.Philox(key=[self.seed, QUESTION_PLACE], counter=[0, copy, number, 0]).random_raw()
            question_first = int(draw) < self.question_first_prob * 2.0**64
            answer = self.tokenizer.encode(f" {example.answer}")
            context = SEPARATOR.join(passages)
            read, kept = self._fitting_prompt(context, example, question_first, self.longest - len(answer) - 1)
            if kept < len(context):
                counts.cut += 1
                counts.answers_cut += example.answer in context and example.answer not in context[:kept]
            tokens = np.array([*read, *answer, self.tokenizer.eos_id], dtype=np.uint32)
            predicted = np.arange(len(tokens)) >= len(read)
            yield Encoded(tokens, predicted)

    def _fitting_prompt(
        self, context: str, example: QuestionAnswer, question_first: bool, room: int
    ) -> tuple[list[int], int]:
        """The tokens of a prompt with as much of the context's beginning as there is room for, and its characters.

        Raises:
            UserError: the question alone does not fit.
        """

        def tokens(kept: int) -> list[int]:
            return self.tokenizer.encode(prompt(context[:kept], example.question, question_first=question_first))

        whole = tokens(len(context))
        if len(whole) <= room:
            return whole, len(context)
        bare = tokens(0)
        if len(bare) > room:
            raise UserError(
                f"{example.place}: question and answer have {self.longest - room + len(bare) - 1} tokens, more than "
                f"data.sequence_length {self.longest - 1}, even without the context; raise the sequence length, or "
                f"remove the example"
            )
        # Between a beginning that fits and one that does not, where the room would end if all parts had as many tokens.
        fitting, low, too_many, high = bare, 0, len(whole), len(context)
        for _ in range(_TRIES):
            spare = room - len(fitting)
            if spare <= room // _SPARE_SHARE or high - low <= 1:
                break
            step = (high - low) * spare // (too_many - len(fitting))
            middle = low + min(max(step, 1), high - low - 1)
            found = tokens(middle)
            if len(found) <= room:
                fitting, low = found, middle
            else:
                too_many, high = len(found), middle
        return fitting, low


_TRIES = 12
"""At most so many lengths of a context are tried."""
_SPARE_SHARE = 512
"""A context is long enough when no more than this part of the room is left."""
