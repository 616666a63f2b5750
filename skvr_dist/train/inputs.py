"""The data sets that a run reads, held against the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from skvr_dist.data.reader import SequenceStream, validation_sequences
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.model.attention import require_backend
from skvr_dist.train.config import Config


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    train: Dataset
    sequences: SequenceStream
    """The training sequences by number."""
    held_out: Tensor
    """The held-out sequences of each evaluation, int64 [N, S + 1]: whole micro-batches for every replica."""


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Open what a run reads and hold it against the configuration, before any process group exists.

    Raises:
        UserError: a data set is missing, damaged or does not fit.
    """
    replicas = config.data_parallel_size(world_size)
    require_backend(config.model.attention)
    train, held_out = Dataset.open(config.data.train), Dataset.open(config.data.validation)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    train.require_same_tokenizer(held_out)
    train.require_vocabulary(config.model.vocab_size)
    if tokenizer.sha256 != train.manifest.tokenizer_sha256:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer} is {tokenizer.sha256[:12]}, but data set {train.folder} was made "
            f"with {train.manifest.tokenizer_sha256[:12]}; give the one beside the data set"
        )
    sequences = SequenceStream(
        train, sequence_length=config.data.sequence_length, lanes=config.data.lanes, seed=config.train.seed
    )
    round_size = config.train.micro_batch_size * replicas
    held_out_sequences = validation_sequences(
        held_out,
        sequence_length=config.data.sequence_length,
        num_sequences=-(-config.evaluate.sequences // round_size) * round_size,
    )
    return Inputs(train, sequences, held_out_sequences)
