"""The micro-batches that a replica trains on, with the time they took and the damage they met.

One rank of those that share a stage's layers reads them and gives them to the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import MicroBatchReader, SequenceStream
from skvr_dist.errors import UserError
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.mesh import Mesh


def open_reader(config: Config, sequences: SequenceStream, mesh: Mesh) -> MicroBatchReader | None:
    """What reads this replica's micro-batches, on the rank that does it for its stage; to be opened before the model.

    None where another rank reads them, or no token is read.
    """
    if mesh.tp_rank != 0 or not _reads_tokens(config, mesh):
        return None
    return MicroBatchReader(
        sequences,
        micro_batch_size=config.train.micro_batch_size,
        micro_batches_per_step=config.num_micro_batches,
        replica=mesh.dp_rank,
        replicas=mesh.dp_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def training_batches(
    config: Config, reader: MicroBatchReader | None, mesh: Mesh, first_step: int
) -> Iterator[MicroBatch]:
    """This replica's micro-batches from step `first_step` on; nothing on stages that read no tokens."""
    if not _reads_tokens(config, mesh):
        return iter(())
    if reader is not None:
        reader.go_to(first_step)
    if mesh.tp_group_on_host is None:
        assert reader is not None
        return reader
    shape = config.train.micro_batch_size, config.data.sequence_length
    return SharedBatches(reader, mesh, shape, separate_documents=config.data.documents == "separate")


def _reads_tokens(config: Config, mesh: Mesh) -> bool:
    """The first stage embeds tokens, the last one has labels; the bounds of documents are needed by all."""
    return mesh.pp_rank in (0, mesh.pp_size - 1) or config.data.documents == "separate"


class SharedBatches(Iterator[MicroBatch]):
    """Micro-batches that the first of the tensor-parallel ranks reads, on all of them; `next` is collective.

    What the reader meets is raised on all of them. Damage is known to the reader alone, which reports it.

    Args:
        reader: where they come from; None on the others.
        shape: B, S of every micro-batch.
        separate_documents: the micro-batches have documents.
    """

    def __init__(
        self, reader: Iterator[MicroBatch] | None, mesh: Mesh, shape: tuple[int, int], *, separate_documents: bool
    ) -> None:
        assert mesh.tp_group_on_host is not None
        self._reader, self._mesh, self._group = reader, mesh, mesh.tp_group_on_host
        self._shape = (2 + separate_documents, *shape)  # tokens, labels, documents

    def __next__(self) -> MicroBatch:
        said, batch = b"", None
        if self._reader is not None:
            try:
                batch = next(self._reader)
            except UserError as error:
                said = str(error).encode()
        with naming_the_operation(self._mesh, "the hand-out of a micro-batch"):
            length = int(self._from_reader(torch.tensor(len(said))))
            if length:
                text = torch.tensor(list(said)) if said else torch.zeros(length, dtype=torch.long)
                raise UserError(bytes(self._from_reader(text).tolist()).decode())
            parts = [part for part in batch[:3] if part is not None] if batch else []
            handed = self._from_reader(torch.stack(parts) if parts else torch.zeros(self._shape, dtype=torch.long))
        return batch or MicroBatch(*handed)

    def _from_reader(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor


class WatchedBatches(Iterator[MicroBatch]):
    """Micro-batches, with the seconds spent waiting for them and the labels that damage cost; logs the damage.

    Where documents are separate it counts the pairs of positions that are in the same one, which attention is over.
    """

    def __init__(self, source: Iterator[MicroBatch], log: logging.Logger) -> None:
        self._source = source
        self._log = log
        self._known_damage: set[str] = set()
        self.seconds = 0.0
        self.lost_tokens = 0
        self.document_pairs = 0

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        try:
            batch = next(self._source)
        finally:
            self.seconds += time.perf_counter() - started
        self.lost_tokens += batch.lost_tokens
        if batch.documents is not None:
            self.document_pairs += pairs_within(batch.documents)
        for sentence in batch.damage:
            if sentence not in self._known_damage:  # workers and epochs meet it again
                self._known_damage.add(sentence)
                self._log.warning("left out: %s", sentence)
        return batch


def pairs_within(documents: Tensor) -> int:
    """Pairs of positions that are in the same document, each with itself and both orders of two.

    Args:
        documents: int [B, S], the number of each position's document within its sequence, below S.
    """
    sequences = torch.arange(len(documents)).unsqueeze(1) * documents.shape[1]
    return int(torch.bincount((documents + sequences).flatten()).square().sum())
