"""What a training step reads: tokens, labels and documents of a micro-batch.

Shapes: B sequences, S sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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
    """What was found to be damaged while this micro-batch was read, a sentence each."""

    @classmethod
    def of(cls, batch: MicroBatch | Tensor) -> MicroBatch:
        """Also of plain sequences, int64 [B, S + 1]: every token but the first is a label."""
        return batch if isinstance(batch, MicroBatch) else cls(batch[:, :-1], batch[:, 1:])


def document_starts(documents: Tensor) -> Tensor:
    """bool [B, S]: where a sequence or a document begins."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts


def positions_of(documents: Tensor) -> Tensor:
    """int64 [B, S]: the place of each token within its document."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return place - torch.where(document_starts(documents), place, 0).cummax(dim=1).values
