"""One of the tensor-parallel ranks reads the micro-batches, and what it meets is met by all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import SHAPE
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.batches import SharedBatches

SENTENCE = "shard-00003.tar is damaged: 3 bytes are missing, «übel»; prepare it anew"


def micro_batches(replica: int) -> Iterator[MicroBatch]:
    for number in range(2):
        sequences = torch.arange(18).view(2, 9) + 100 * replica + 1000 * number
        yield MicroBatch.of(sequences, separate_at=3)._replace(lost_tokens=5)
    raise UserError(SENTENCE)


def read(separate_documents: bool) -> tuple[int, list[MicroBatch], str]:
    mesh = Mesh.build(ParallelConfig(tensor=2), ModelConfig.model_validate(SHAPE))
    reader = micro_batches(mesh.dp_rank) if mesh.tp_rank == 0 else None
    if reader and not separate_documents:
        reader = (batch._replace(documents=None) for batch in reader)
    batches = SharedBatches(reader, mesh, (2, 8), separate_documents=separate_documents)
    found = [next(batches), next(batches)]
    with pytest.raises(UserError) as raised:
        next(batches)
    return mesh.dp_rank, found, str(raised.value)


@pytest.mark.parametrize("separate_documents", [False, True])
def test_one_rank_reads_for_its_tensor_parallel_group(separate_documents: bool) -> None:
    for rank, (replica, found, said) in enumerate(run_ranks(4, read, separate_documents)):
        assert said == SENTENCE
        for batch, expected in zip(found, (next(one) for one in [micro_batches(replica)] * 2), strict=True):
            assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.labels, expected.labels)
            if separate_documents:
                assert batch.documents is not None and expected.documents is not None
                assert torch.equal(batch.documents, expected.documents)
            else:
                assert batch.documents is None
            assert batch.lost_tokens == (0 if rank % 2 else 5)  # counted once
