"""Held-out sequences: always the same ones, taken evenly from data sets that are never trained on.

Shapes: N sequences, S sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skvr_dist.config.data import HeldOutConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.finetune.sequences import FinetuneSequences
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError

HeldOutSet = Dataset | FinetuneSequences


def open_held_out(
    sources: Mapping[str, HeldOutConfig],
    tokenizer: Tokenizer | None,
    *,
    tokenizer_path: str,
    sequence_length: int,
    cache: str | None = None,
) -> list[HeldOutSet]:
    """Open the held-out data sets of a configuration.

    Args:
        tokenizer: of the run; only examples need one.
        tokenizer_path: its path, beside which chats have their template.
        cache: folder that keeps the tokens of examples, as for `FinetuneSequences.open`.

    Raises:
        UserError: one is missing or damaged, or cannot be read.
    """
    sets: list[HeldOutSet] = []
    for name, source in sources.items():
        if not source.has_examples:
            sets.append(Dataset.open(source.path))
        elif tokenizer is None:
            raise UserError(f"data.validation.{name} holds examples, for which no tokenizer is there; name another set")
        else:
            sets.append(
                FinetuneSequences.open(
                    source,
                    tokenizer,
                    tokenizer_path=tokenizer_path,
                    sequence_length=sequence_length,
                    seed=None,
                    cache=cache,
                )
            )
    return sets


def available_sequences(held_out: HeldOutSet, sequence_length: int) -> int:
    """How many sequences a set holds, none of which predicts a token of another."""
    if isinstance(held_out, Dataset):
        return (held_out.manifest.tokens - 1) // sequence_length
    return len(held_out.rows)


def validation_sequences(dataset: Dataset, *, sequence_length: int, num_sequences: int) -> Tensor:
    """Held-out sequences, spread evenly over the data set as it is stored: int64 [N, S + 1].

    Cut into sequences of S tokens to predict, the data set holds A of them; number i of N is its sequence
    i * A // N. Nothing is shuffled, and no token is predicted twice.

    Raises:
        UserError: the data set holds fewer sequences (it is never repeated), or a shard is damaged.
    """
    available = (dataset.manifest.tokens - 1) // sequence_length
    if available < num_sequences:
        raise UserError(
            f"data set {dataset.location} holds {available} sequences of {sequence_length} tokens, but "
            f"{num_sequences} are asked for; lower evaluate.sequences (of a tool --sequences or --batch-size), or hold "
            f"out a larger share"
        )
    tokens = _StoredTokens(dataset)
    starts = [number * available // num_sequences * sequence_length for number in range(num_sequences)]
    return torch.from_numpy(np.stack([tokens.read(start, sequence_length + 1) for start in starts]))


def held_out_batches(
    sets: Sequence[HeldOutSet],
    *,
    sequence_length: int,
    sequences: int,
    batch_size: int,
    separate_documents: bool,
    batches_multiple_of: int = 1,
) -> list[MicroBatch]:
    """Held-out sequences in batches, their number rounded up to whole ones; of several sets equally many of each.

    Args:
        sequences: how many, at least.
        separate_documents: attention stays within documents, and the end of one predicts nothing.
        batches_multiple_of: replicas that share the batches equally.

    Raises:
        UserError: as `validation_sequences` does.
    """
    together = batch_size * batches_multiple_of
    total = -(-sequences // together) * together
    parts = []
    for number, held_out in enumerate(sets):
        count = total // len(sets) + (number < total % len(sets))
        if count:
            parts.append(_take(held_out, count, sequence_length, separate_documents))
    tokens, labels = torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts])
    separate = [part.documents for part in parts if part.documents is not None]
    documents = torch.cat(separate).split(batch_size) if separate else repeat(None)
    batches = zip(tokens.split(batch_size), labels.split(batch_size), documents, strict=False)
    return [MicroBatch(*batch) for batch in batches]


def _take(held_out: HeldOutSet, count: int, sequence_length: int, separate_documents: bool) -> MicroBatch:
    """That many sequences of a set, evenly from all over it."""
    if isinstance(held_out, Dataset):
        rows = validation_sequences(held_out, sequence_length=sequence_length, num_sequences=count)
        return MicroBatch.of(rows, held_out.manifest.eos_id if separate_documents else None)
    available = len(held_out.rows)
    if available < count:
        raise UserError(
            f"the held-out examples in {held_out.location} fill {available} sequences of {sequence_length} tokens, but "
            f"{count} are asked for; lower evaluate.sequences (of a tool --sequences or --batch-size), or hold out "
            f"more of them"
        )
    taken = [held_out.read(number * available // count, 1) for number in range(count)]
    tokens, labels = np.concatenate([rows.tokens for rows in taken]), np.concatenate([rows.labels for rows in taken])
    documents = np.concatenate([rows.documents for rows in taken if rows.documents is not None])
    return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(documents))


class _StoredTokens:
    """A data set as one array of tokens, in stored order; holds one shard in memory."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._ends = np.cumsum([shard.tokens for shard in dataset.manifest.shards])
        self._number = -1
        self._tokens: NDArray[Any] = np.empty(0, dtype=np.uint16)

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        parts: list[NDArray[Any]] = []
        while length:
            number = int(np.searchsorted(self._ends, start, side="right"))
            if number != self._number:
                shard = self._dataset.open_shard(number)
                self._tokens = np.concatenate([shard.read(chunk).tokens for chunk in range(len(shard.chunks))])
                self._number = number
            offset = start - (int(self._ends[number]) - len(self._tokens))
            parts.append(self._tokens[offset : offset + length])
            start, length = start + len(parts[-1]), length - len(parts[-1])
        return np.concatenate(parts).astype(np.int64)
