"""The `data:` section: where the tokens come from and how they are cut into sequences."""

from __future__ import annotations

from pydantic import Field

from skvr_dist.section import Section


class DataConfig(Section):
    """Tokenised data sets, as `tools/prepare_data.py` writes them."""

    train: str
    """Folder of the training data set (shards and manifest.json)."""
    validation: str
    """Folder of the held-out data set."""
    tokenizer: str
    """The tokenizer of both: it travels with checkpoints and exports."""
    sequence_length: int = Field(gt=0)
    """Tokens that the model reads per sequence; each sequence on disk spans one more, the last label."""
    lanes: int = Field(default=16, gt=0)
    """Independent token streams that the sequences of a batch are dealt from, whatever the number of replicas.

    Must be a multiple of micro_batch_size x data-parallel replicas, and no larger than the number of shards.
    """
    prefetch: int = Field(default=4, ge=0)
    """Micro-batches read ahead of the training step by a background thread (0: none)."""
