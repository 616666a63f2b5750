"""What a training step reads: tokens, labels and documents of a micro-batch.

Shapes: B sequences, S sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100
"""Label of a position without loss; torch's cross entropy leaves it out."""


class MicroBatch(NamedTuple):
    """Sequences that one forward pass runs."""

    tokens: Tensor
    """int64 [B, S]."""
    labels: Tensor
    """int64 [B, S]: the token to predict at each position, or `IGNORED`."""
    documents: Tensor | None = None
    """int64 [B, S]: number of the document within its sequence, from 0 and never falling, if a position attends only
    to its own document; None if it attends to everything before it."""
    lost_tokens: int = 0
    """Labels that are ignored because their shard is damaged."""
    damage: tuple[str, ...] = ()
    """A sentence about each piece of damage that was met while this micro-batch was read."""

    @classmethod
    def of(cls, sequences: Tensor, separate_at: int | None = None) -> MicroBatch:
        """A micro-batch of plain sequences, int64 [B, S + 1]: every token but the first is a label.

        Args:
            separate_at: the token that ends documents, if they are to be separate: it then predicts nothing.
        """
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        if separate_at is None:
            return cls(tokens, labels)
        ends = tokens == separate_at
        return cls(tokens, labels.masked_fill(ends, IGNORED), ends.cumsum(dim=1) - ends.long())

    def to(self, device: str) -> MicroBatch:
        """The micro-batch on another device."""
        documents = None if self.documents is None else self.documents.to(device)
        return self._replace(tokens=self.tokens.to(device), labels=self.labels.to(device), documents=documents)
