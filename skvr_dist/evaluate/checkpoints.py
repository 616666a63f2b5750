"""Evaluating a checkpoint in one process: its decoder, its held-out data, its strategies."""

from __future__ import annotations

from collections.abc import Sequence

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import validation_sequences
from skvr_dist.data.shards import Dataset
from skvr_dist.evaluate.retention import RetentionPoint, retention_curve
from skvr_dist.routing import CacheStrategy

DEFAULT_STRATEGIES = ("full", "every:2", "every:3", "every:4", "every:8")


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    strategies: Sequence[str],
    *,
    sequences: int,
    data: str | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[RetentionPoint]:
    """The retention curve of a checkpoint over its first held-out sequences.

    Args:
        strategies: as `CacheStrategy.parse` reads them; names refer to the run's `evaluate.profiles`.
        sequences: held-out sequences, rounded up to whole batches.
        data: folder of another held-out data set.
        batch_size: sequences at a time.
        device: where the decoder runs, in float32.
    """
    tree = checkpoint.config_tree
    layers, profiles = checkpoint.model_config.num_hidden_layers, tree["evaluate"]["profiles"]
    parsed = {spec: CacheStrategy.parse(spec, layers, profiles) for spec in strategies}
    dataset = Dataset.open(data or tree["data"]["validation"])
    dataset.require_vocabulary(checkpoint.model_config.vocab_size)
    held_out = validation_sequences(
        dataset,
        sequence_length=tree["data"]["sequence_length"],
        num_sequences=-(-sequences // batch_size) * batch_size,
    )
    separate_at = dataset.manifest.eos_id if tree["data"].get("documents") == "separate" else None
    batches = [MicroBatch.of(batch, separate_at) for batch in held_out.to(device).split(batch_size)]
    return retention_curve(checkpoint.load_decoder().to(device), batches, parsed)
