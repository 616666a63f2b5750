"""The reader: one order of tokens, whatever the replicas, the start and the reading ahead."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skvr_dist.data.reader import MicroBatchReader, SequenceStream, _permutation, validation_sequences
from skvr_dist.data.shards import Dataset, ShardTokens
from skvr_dist.data.sources import open_corpus
from skvr_dist.data.tokenizer import train_tokenizer
from skvr_dist.data.writer import DatasetWriter
from skvr_dist.errors import UserError

TOKENIZER = train_tokenizer(
    (document for document in open_corpus("stdlib") if document.id.startswith("json/")), vocab_size=500
)
EOS = TOKENIZER.eos_id
SHARDS, LANES, SEQUENCE_LENGTH = 13, 8, 24
SETTINGS: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "lanes": LANES, "seed": 7}
BATCHES: dict[str, Any] = {**SETTINGS, "micro_batch_size": 2, "micro_batches_per_step": 8}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """150 documents of 2 to 40 tokens, no two alike."""
    folder = tmp_path_factory.mktemp("data") / "train"
    generator = np.random.default_rng(0)
    with DatasetWriter(folder, num_shards=SHARDS, tokenizer=TOKENIZER) as writer:
        for number in range(150):
            filling = generator.integers(3, 500, generator.integers(0, 38))
            writer.write(str(number), [3 + number, *filling, EOS], text_bytes=1)
        writer.finish(corpus_sha256="", validation_share=0.0)
        writer.publish()
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def in_order(dataset: Dataset) -> list[list[int]]:
    """The first 400 sequences, read one after the other: each lane goes through its shards more than twice."""
    stream = SequenceStream(dataset, **SETTINGS)
    out = np.empty((400, SEQUENCE_LENGTH + 1), dtype=np.int64)
    for number, row in enumerate(out):
        stream.read(number, row)
    return out.tolist()


def documents_of(tokens: list[int]) -> Counter[tuple[int, ...]]:
    """The documents that a stretch of whole ones holds."""
    found: Counter[tuple[int, ...]] = Counter()
    start = 0
    for end, token in enumerate(tokens, start=1):
        if token == EOS:
            found[tuple(tokens[start:end])] += 1
            start = end
    assert start == len(tokens)
    return found


def lane_tokens(dataset: Dataset, lane: int, count: int, **settings: Any) -> list[int]:
    """The first `count` tokens of a lane, pieced together from its sequences."""
    stream = SequenceStream(dataset, **{**SETTINGS, **settings})
    tokens: list[int] = []
    out = np.empty(SEQUENCE_LENGTH + 1, dtype=np.int64)
    for k in range(-(-count // SEQUENCE_LENGTH)):
        stream.read(lane + k * LANES, out)
        assert tokens[-1:] in ([], [out[0]]), "the last token of a sequence is the first of the next"
        tokens[-1:] = out.tolist()
    return tokens[:count]


def stored_documents(dataset: Dataset, lane: int) -> Counter[tuple[int, ...]]:
    return sum(
        (documents_of(dataset.read_shard(shard).tokens.tolist()) for shard in range(lane, SHARDS, LANES)), Counter()
    )


@pytest.mark.parametrize("lane", range(LANES))
def test_every_document_once_per_epoch(dataset: Dataset, lane: int) -> None:
    epoch = sum(dataset.manifest.shards[shard].tokens for shard in range(lane, SHARDS, LANES))
    tokens = lane_tokens(dataset, lane, 3 * epoch)
    epochs = [tokens[e * epoch : (e + 1) * epoch] for e in range(3)]
    assert [documents_of(tokens) for tokens in epochs] == [stored_documents(dataset, lane)] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]  # each in an order of its own
    assert tokens != lane_tokens(dataset, lane, 3 * epoch, seed=8)


def test_orders_are_those_of_this_version() -> None:
    """Other ones would send every resumed run elsewhere: raise `order` in the fingerprint with them."""
    assert _permutation(seed=7, purpose=1, epoch=3, index=2, length=8).tolist() == [2, 3, 6, 5, 1, 7, 4, 0]


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 399), min_size=1, max_size=10))
def test_any_sequence_can_be_read_at_any_time(dataset: Dataset, in_order: list[list[int]], numbers: list[int]) -> None:
    stream = SequenceStream(dataset, **SETTINGS)
    out = np.empty(SEQUENCE_LENGTH + 1, dtype=np.int64)
    for number in numbers:
        stream.read(number, out)
        assert out.tolist() == in_order[number]


def test_positions_far_out_are_reached_at_once(dataset: Dataset) -> None:
    (batch,) = islice(reader_of(dataset, start_step=10**15), 1)
    assert batch.shape == (2, SEQUENCE_LENGTH + 1)


def reader_of(dataset: Dataset, **options: Any) -> MicroBatchReader:
    options = {**BATCHES, **options}
    sequences = SequenceStream(dataset, **{key: options.pop(key) for key in SETTINGS})
    return MicroBatchReader(sequences, **options)


def run_of(dataset: Dataset, *, steps: int, replicas: int, **options: Any) -> list[Tensor]:
    """The micro-batches of the first steps in global order, from as many readers as there are replicas."""
    readers = [reader_of(dataset, **options, replica=replica, replicas=replicas) for replica in range(replicas)]
    micro_batches = BATCHES["micro_batches_per_step"]
    return [next(readers[q % replicas]) for _ in range(steps) for q in range(micro_batches)]


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("start_step", [0, 1, 9])
def test_the_tokens_of_a_step_are_the_same_for_all(
    dataset: Dataset, replicas: int, prefetch: int, start_step: int
) -> None:
    expected = run_of(dataset, steps=12, replicas=1)[start_step * 8 :]
    got = run_of(dataset, steps=12 - start_step, replicas=replicas, prefetch=prefetch, start_step=start_step)
    assert all(batch.dtype == torch.int64 and batch.shape == (2, SEQUENCE_LENGTH + 1) for batch in got)
    assert torch.equal(torch.stack(got), torch.stack(expected))


def test_micro_batches_hold_the_sequences_in_order(dataset: Dataset, in_order: list[list[int]]) -> None:
    rows = torch.cat(run_of(dataset, steps=3, replicas=2)).tolist()
    assert rows == in_order[: len(rows)]


def test_replicas_read_lanes_of_their_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: set[int] = set()
    read_shard = Dataset.read_shard

    def watched(self: Dataset, index: int) -> ShardTokens:
        lanes.add(index % LANES)
        return read_shard(self, index)

    monkeypatch.setattr(Dataset, "read_shard", watched)
    for replica in range(4):
        lanes.clear()
        for _ in islice(reader_of(dataset, replica=replica, replicas=4), 100):
            pass
        assert lanes == {2 * replica, 2 * replica + 1}


def test_a_document_longer_than_a_sequence_and_an_epoch_shorter_than_one(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data", num_shards=1, tokenizer=TOKENIZER) as writer:
        writer.write("long", [*range(3, 103), EOS], text_bytes=1)
        writer.finish(corpus_sha256="", validation_share=0.0)
        writer.publish()
    reader = reader_of(Dataset.open(tmp_path / "data"), sequence_length=30, lanes=1, micro_batch_size=1)
    tokens = torch.cat([batch[0, :-1] for batch in islice(reader, 20)]).tolist()
    assert tokens == ([*range(3, 103), EOS] * 6)[:600]
    reader = reader_of(Dataset.open(tmp_path / "data"), sequence_length=500, lanes=1, micro_batch_size=1)
    assert next(reader)[0].tolist() == ([*range(3, 103), EOS] * 5)[:501]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 14}, r"train has 13 shards, fewer than data.lanes 14; use at most 13 lanes, or .* --shards 14"),
        ({"lanes": 6, "replicas": 4}, r"data.lanes 6 must be a multiple of micro-batch size x replicas = 2 x 4"),
        ({"micro_batches_per_step": 6, "replicas": 4}, "6 micro-batches of a step cannot be shared by 4 replicas"),
    ],
)
def test_what_does_not_fit_is_refused(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reader_of(dataset, **options)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_damage_is_reported_from_the_thread_too(dataset: Dataset, tmp_path: Path, prefetch: int) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(dataset.folder, folder)
    shard = folder / "shard-00002.tar"
    shard.write_bytes(shard.read_bytes()[::-1])
    reader = reader_of(Dataset.open(folder), prefetch=prefetch)
    next(reader)  # lanes 0 and 1; the damaged shard is one of lane 2
    with pytest.raises(UserError, match=r"shard-00002.tar is damaged"):
        list(islice(reader, 100))


def test_the_fingerprint_follows_what_decides_the_order(dataset: Dataset, tmp_path: Path) -> None:
    def fingerprint(data: Dataset = dataset, **options: Any) -> str:
        order = {key: {**BATCHES, **options}[key] for key in SETTINGS}
        return SequenceStream(data, **order).fingerprint()

    same = fingerprint()
    moved = Dataset.open(shutil.copytree(dataset.folder, tmp_path / "moved"))
    assert same == fingerprint(moved)
    assert len({same, fingerprint(seed=8), fingerprint(lanes=4), fingerprint(sequence_length=25)}) == 4


def test_held_out_sequences_predict_each_token_once(dataset: Dataset) -> None:
    shards = [dataset.read_shard(index).tokens for index in range(SHARDS)]
    stored = np.concatenate(shards).astype(np.int64)
    available = (len(stored) - 1) // 10
    sequences = validation_sequences(dataset, sequence_length=10, num_sequences=available)
    assert sequences.shape == (available, 11)
    assert sequences.dtype == torch.int64
    assert sequences[:, 1:].flatten().tolist() == stored[1 : available * 10 + 1].tolist()
    assert torch.equal(sequences[:-1, -1], sequences[1:, 0])
    few = validation_sequences(dataset, sequence_length=10, num_sequences=3)
    assert torch.equal(few, sequences[:3])
    with pytest.raises(UserError, match=rf"holds {available} sequences of 10 tokens, but {available + 1} are asked"):
        validation_sequences(dataset, sequence_length=10, num_sequences=available + 1)
