"""Evaluating a checkpoint in one process: its decoder, held-out data, its strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.data import HeldOutConfig
from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.data.held_out import HeldOutSet, available_sequences, held_out_batches, open_held_out
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.retention import RetentionPoint, retention_curve
from skvr_dist.routing import CacheStrategy

DEFAULT_STRATEGIES = ("full", "every:2", "every:3", "every:4", "every:8")
USUAL_SEQUENCES = 256
"""Held-out sequences that are measured where the caller names no number, or as many as there are."""
_USUAL_LENGTH = 1024  # tokens per sequence, where neither the checkpoint nor the caller names another


@dataclass(frozen=True)
class HeldOutData:
    """The data sets that a checkpoint is measured over, and how they are cut into sequences."""

    sets: Sequence[HeldOutSet]
    sequence_length: int
    separate_documents: bool
    """Whether a position attends to its own document only, and the end of one predicts nothing."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        data: str | None = None,
        sequence_length: int | None = None,
        documents: str | None = None,
    ) -> HeldOutData:
        """A checkpoint's own held-out data, or what is given instead; an import has none of its own.

        Args:
            data: location of a data set; None takes the checkpoint's.
            sequence_length: tokens to predict per sequence; None takes the checkpoint's, or for an import 1024, or as
                many as its model can read.
            documents: `joined` or `separate`; None takes what the checkpoint was trained with.

        Raises:
            UserError: neither the checkpoint nor the caller names a data set; there is none; or sequences are longer
                than the model's.
        """
        own = checkpoint.config.data
        sources = own.validation if data is None else {"data": HeldOutConfig(path=data)}
        if sources is None:
            raise UserError(
                f"checkpoint {checkpoint.folder} names no held-out data, for it was imported; give --data FOLDER "
                f"(tools/prepare_data.py --tokenizer {checkpoint.folder} makes a data set)"
            )
        longest = checkpoint.model_config.max_position_embeddings
        length = sequence_length or own.sequence_length or min(longest, _USUAL_LENGTH)
        if not 0 < length <= longest:
            raise UserError(f"the sequence length {length} must be between 1 and max_position_embeddings {longest}")
        file = checkpoint.tokenizer_file
        tokenizer = load_tokenizer(file) if file and any(each.has_examples for each in sources.values()) else None
        sets = open_held_out(sources, tokenizer, tokenizer_path=str(checkpoint.folder), sequence_length=length)
        return cls(sets, length, (documents or own.documents) == "separate")

    @property
    def location(self) -> str:
        """Where the data sets are."""
        return ", ".join(each.location for each in self.sets)

    @property
    def fingerprint(self) -> str:
        """Equal for the same data sets."""
        return "-".join(each.fingerprint for each in self.sets)

    def require_fits(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint to which the tokens of this data set mean something else.

        Raises:
            UserError: its vocabulary is smaller, or its tokenizer is another one.
        """
        for dataset in self.sets:
            if isinstance(dataset, Dataset):
                _require_fits(dataset, checkpoint)

    def batches(self, sequences: int | None, batch_size: int, device: str) -> list[MicroBatch]:
        """Held-out sequences, spread over the data set, their number rounded up to whole batches.

        Without a number: `USUAL_SEQUENCES`, or the whole batches that the data set holds, or all in one smaller batch.
        """
        if sequences is None:
            there = len(self.sets) * min(available_sequences(each, self.sequence_length) for each in self.sets)
            batch_size = max(1, min(batch_size, there))
            sequences = max(1, min(USUAL_SEQUENCES, there // batch_size * batch_size))
        batches = held_out_batches(
            self.sets,
            sequence_length=self.sequence_length,
            sequences=sequences,
            batch_size=batch_size,
            separate_documents=self.separate_documents,
        )
        return [batch.to(device) for batch in batches]


def _require_fits(dataset: Dataset, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint to which the tokens of a data set mean something else."""
    dataset.require_vocabulary(checkpoint.model_config.vocab_size)
    if checkpoint.tokenizer_file is None:
        return
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer_file)
    except UserError:  # it came along with an import, and no data set can be made with it
        return
    if not dataset.is_made_with(tokenizer):
        raise UserError(
            f"data set {dataset.location} was made with tokenizer {dataset.manifest.tokenizer_sha256[:12]}, but "
            f"checkpoint {checkpoint.folder} has {tokenizer.sha256[:12]}; prepare one with --tokenizer "
            f"{checkpoint.tokenizer_file}"
        )


@dataclass(frozen=True)
class Measurement:
    """A retention curve and what it was measured over."""

    data: str
    """Location of the data set, or of several."""
    data_fingerprint: str
    """Equal for the same data."""
    documents: str
    sequences: int
    sequence_length: int
    tokens: int
    """Labels that the loss is a mean over."""
    points: list[RetentionPoint]

    def record(self) -> dict[str, Any]:
        """The measurement as plain values."""
        return asdict(self)


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    held_out: HeldOutData,
    strategies: Sequence[str],
    *,
    sequences: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> Measurement:
    """The retention curve of a checkpoint.

    Args:
        strategies: as `CacheStrategy.parse` reads them; names refer to the run's `evaluate.profiles`.
        sequences: held-out sequences, as `HeldOutData.batches` takes them.
        batch_size: sequences at a time.
        device: where the decoder runs, in float32.

    Raises:
        UserError: a strategy cannot be read, or the data does not fit the checkpoint or does not suffice.
    """
    layers, profiles = checkpoint.model_config.num_hidden_layers, checkpoint.config.evaluate.profiles
    parsed = CacheStrategy.parse_all(strategies, layers, profiles)
    held_out.require_fits(checkpoint)
    batches = held_out.batches(sequences, batch_size, device)
    return Measurement(
        data=held_out.location,
        data_fingerprint=held_out.fingerprint,
        documents="separate" if held_out.separate_documents else "joined",
        sequences=sum(len(batch.tokens) for batch in batches),
        sequence_length=held_out.sequence_length,
        tokens=sum(int((batch.labels != IGNORED).sum()) for batch in batches),
        points=retention_curve(checkpoint.load_decoder().to(device), batches, parsed),
    )


def require_losses(checkpoint: Checkpoint, losses: Mapping[str, float]) -> None:
    """Refuse a model that computes no numbers, from which nothing could be drawn.

    Args:
        losses: held-out ones, by cache strategy.

    Raises:
        UserError: it is one.
    """
    for strategy, loss in losses.items():
        if not math.isfinite(loss):
            raise UserError(
                f"{checkpoint.folder} has a held-out loss of {loss} at {strategy}; give a checkpoint from before the "
                f"loss was lost"
            )
