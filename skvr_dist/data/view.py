"""Sequences as text for a person to look at, before GPU hours are spent on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from skvr_dist.data.batch import IGNORED
from skvr_dist.data.reader import Rows
from skvr_dist.data.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Passage:
    """Neighbouring tokens of one document that are all predicted, or all only read."""

    document: int
    """Within the sequence, from 0."""
    is_predicted: bool
    tokens: int
    text: str
    ends_document: bool


def passages(rows: Rows, row: int, tokenizer: Tokenizer) -> list[Passage]:
    """One of the sequences in `rows`, and the labels beyond its last token, in pieces."""
    found = []
    for (document, is_predicted), group in groupby(_tokens(rows, row, tokenizer.eos_id), key=lambda token: token[:2]):
        ids = [token[2] for token in group]
        text = tokenizer.decode(ids)
        found.append(Passage(document, is_predicted, len(ids), text, ids[-1] == tokenizer.eos_id))
    return found


def _tokens(rows: Rows, row: int, eos_id: int) -> Iterator[tuple[int, bool, int]]:
    """(document, whether it is predicted, id) of each token that is read or predicted, in order."""
    tokens, labels = rows.tokens[row].tolist(), rows.labels[row].tolist()
    if rows.documents is None:  # one document to the model; the ends of those that it is made of are shown
        document = 0
        yield document, False, tokens[0]
        for token, label, after in zip(tokens, labels, [*tokens[1:], None], strict=True):
            document += token == eos_id
            if label != IGNORED:
                yield document, True, label
            elif after is not None:
                yield document, False, after
        return
    documents = rows.documents[row].tolist()
    for at, (document, label) in enumerate(zip(documents, labels, strict=True)):
        if at == 0 or documents[at - 1] != document:
            yield document, False, tokens[at]
        if label != IGNORED:
            yield document, True, label
        elif at + 1 < len(tokens) and documents[at + 1] == document:
            yield document, False, tokens[at + 1]


def render(sequence: list[Passage]) -> str:
    """Text that is only read stands in double brackets; a line ends each document."""
    parts = []
    for before, passage in zip([None, *sequence], sequence, strict=False):
        if before is not None and before.document != passage.document:
            parts.append(f"\n-------- document {passage.document}\n")
        parts.append(passage.text if passage.is_predicted else f"[[{passage.text}]]")
        if passage.ends_document:
            parts.append("</s>")
    return "".join(parts)
