"""The micro-batches that a replica trains on, with the time they took and the damage they met."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import MicroBatchReader, SequenceStream
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.mesh import Mesh


def training_batches(
    config: Config, sequences: SequenceStream, mesh: Mesh, engine: RoutedPipelineEngine, first_step: int
) -> Iterator[MicroBatch]:
    """This replica's micro-batches from step `first_step` on; nothing on stages that read no tokens."""
    if not (engine.is_first_stage() or engine.is_last_stage() or engine.separate_documents):
        return iter(())
    return MicroBatchReader(
        sequences,
        micro_batch_size=config.train.micro_batch_size,
        micro_batches_per_step=config.num_micro_batches,
        replica=mesh.dp_rank,
        replicas=mesh.dp_size,
        start_step=first_step,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


class WatchedBatches(Iterator[MicroBatch]):
    """Micro-batches, with the seconds spent waiting for them and the labels that damage cost; logs the damage."""

    def __init__(self, source: Iterator[MicroBatch], log: logging.Logger) -> None:
        self._source = source
        self._log = log
        self._known_damage: set[str] = set()
        self.seconds = 0.0
        self.lost_tokens = 0

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        try:
            batch = next(self._source)
        finally:
            self.seconds += time.perf_counter() - started
        self.lost_tokens += batch.lost_tokens
        for sentence in batch.damage:
            if sentence not in self._known_damage:  # workers and epochs meet it again
                self._known_damage.add(sentence)
                self._log.warning("left out: %s", sentence)
        return batch
