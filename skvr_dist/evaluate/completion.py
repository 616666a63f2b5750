"""Completing lines: what stands in a document before a line, and the line to be written next.

Documents are those that `tools/prepare_data.py` holds out, so that a model which was trained on a corpus can be asked
about the same one. Scores are those of CodeXGLUE's completion of lines (Lu et al. 2021, arXiv 2102.04664).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from skvr_dist.data.finetune.encode import Counts, Encoded
from skvr_dist.data.finetune.examples import QuestionAnswer
from skvr_dist.data.prepare.corpus import Document, hash_fraction
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.answers import Asked
from skvr_dist.evaluate.metrics import best_of, similarity

_LINES_BEFORE = 8
"""A line comes after so many others at least."""
_SHORTEST = 5
"""Characters of a line that says something."""
END_OF_LINE = "\n"


class Line(NamedTuple):
    """A line to be completed."""

    document: str
    """Name of the document."""
    number: int
    """From 1."""
    before: str
    """The document up to the line."""
    text: str
    """The line, without its end."""


def held_out_lines(documents: Iterable[Document], validation_share: float, count: int) -> Iterator[Line]:
    """Lines of the documents that are held out, as many of each as of the others.

    Args:
        validation_share: that the data set was prepared with; what is held out at a smaller share is at a larger one.

    Raises:
        UserError: no document is held out, or none has lines to complete.
    """
    held_out = [each for each in documents if hash_fraction(each.text, "validation") < validation_share]
    waiting = []
    for document in held_out:
        lines = document.text.split(END_OF_LINE)
        numbers = [n for n, line in enumerate(lines[:-1]) if n >= _LINES_BEFORE and _says_something(line)]
        seed = int(hash_fraction(document.text, "lines") * 2**53)
        waiting.append((document.id, lines, list(np.random.default_rng(seed).permutation(numbers))))
    if not any(numbers for _, _, numbers in waiting):
        raise UserError(
            f"no line can be completed: of the corpus {len(held_out)} documents are held out at --validation-share "
            f"{validation_share}, and none has lines after its first {_LINES_BEFORE}; raise the share"
        )
    while count > 0 and any(numbers for _, _, numbers in waiting):
        for name, lines, numbers in waiting:
            if numbers and count > 0:
                number = int(numbers.pop())
                yield Line(name, number + 1, END_OF_LINE.join(lines[:number]) + END_OF_LINE, lines[number])
                count -= 1


def _says_something(line: str) -> bool:
    return len(line.strip()) >= _SHORTEST and not line.lstrip().startswith("#")


def asked_lines(lines: Iterable[Line], tokenizer: Tokenizer, longest: int, new_tokens: int) -> Asked:
    """Lines as questions: the end of what stands before them is read, and they are predicted with their end.

    Args:
        longest: tokens that may be read.
        new_tokens: that may be decoded, which lines that are measured have at most.

    Raises:
        UserError: there is no room before the new tokens, or no line is that short.
    """
    room = longest - new_tokens
    if room < 1:
        raise UserError(f"--decode {new_tokens} leaves no room to read in {longest} tokens; give less")
    asked = Asked([], [], Counts())
    for line in lines:
        before = tokenizer.encode(line.before)
        # Many tokenizers have one token for the end of a line and the indentation of the next, which is predicted.
        healed = tokenizer.decode(before[-1:]) if not tokenizer.decode(before[-1:]).strip() else ""
        before = before[:-1] if healed else before
        answer = tokenizer.encode(healed + line.text + END_OF_LINE)
        if len(answer) > new_tokens or not before:
            continue
        asked.counts.examples += 1
        asked.counts.cut += len(before) > room
        tokens = np.array([*before[-room:], *answer], dtype=np.uint32)
        asked.encoded.append(Encoded(tokens, np.arange(len(tokens)) >= len(tokens) - len(answer)))
        place = f"{line.document}, line {line.number}"
        asked.examples.append(QuestionAnswer((line.document,), _last_lines(line.before), line.text, place))
    if not asked.encoded:
        raise UserError(f"every line has more than --decode {new_tokens} tokens; give more")
    return asked


def _last_lines(text: str) -> str:
    """What people are shown of a text before a line."""
    return END_OF_LINE.join(text.rstrip(END_OF_LINE).split(END_OF_LINE)[-4:])


def ends_of_line(tokenizer: Tokenizer) -> set[int]:
    """The tokens after which a line is over."""
    return {token for token in range(tokenizer.vocab_size) if END_OF_LINE in tokenizer.decode([token])}


def same_words(text: str, line: str) -> float:
    """1 where the first line of a text is the line up to white space, else 0."""
    return float(_first_line(text).split() == line.split())


def edit_similarity(text: str, line: str) -> float:
    """Characters that both have in the same order, over those of both: what `fuzz.ratio` rounds to per cent."""
    return similarity(_first_line(text).strip(), line.strip())


def _first_line(text: str) -> str:
    """The first one that is not empty: a text may begin with the end of the line before."""
    return text.lstrip(END_OF_LINE).split(END_OF_LINE)[0]


METRICS = (best_of("exact match", same_words), best_of("edit similarity", edit_similarity))
"""Of completed lines."""
