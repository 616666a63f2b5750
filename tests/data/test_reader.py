"""The reader: one order of tokens, whatever the replicas, the start and the processes that read ahead."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import CODE, EOS, TOKENIZER, write_dataset

from skvr_dist.config.data import DataConfig
from skvr_dist.config.train import TrainConfig
from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.data.held_out import validation_sequences
from skvr_dist.data.order import MAX_PERIOD, Mixture, Mixtures, permutation
from skvr_dist.data.reader import MicroBatchReader, SequenceStream, SourceData
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.train.inputs import training_sequences

SHARDS, LANES, SEQUENCE_LENGTH = 13, 8, 24
SETTINGS: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "lanes": LANES, "seed": 7}
BATCHES: dict[str, Any] = {"micro_batch_size": 1, "micro_batches_per_step": 8}


def draw_documents(first: int, count: int, seed: int = 0) -> list[list[list[int]]]:
    """`count` documents of 2 to 40 tokens, no two alike, in shards."""
    generator = np.random.default_rng(seed)
    documents = [
        [first + number, *map(int, generator.integers(3, 500, generator.integers(0, 38)))] for number in range(count)
    ]
    return [documents[number::SHARDS] for number in range(SHARDS)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "train", draw_documents(3, 300))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("other") / "train", draw_documents(3, 200, seed=1))


def stream_of(*datasets: Dataset, weights: tuple[float, ...] = (1, 3, 2), **options: Any) -> SequenceStream:
    sources = {f"source-{n}": SourceData(d, w) for n, (d, w) in enumerate(zip(datasets, weights, strict=False))}
    return SequenceStream(sources, **{**SETTINGS, **options})


def sequence(stream: SequenceStream, number: int) -> list[int]:
    rows = stream.read(number, 1)
    return [*rows.tokens[0].tolist(), int(rows.labels[0, -1])]


@pytest.fixture(scope="module")
def in_order(dataset: Dataset) -> list[list[int]]:
    """The first 700 sequences, read one after the other: each lane goes through its shards more than twice."""
    stream = stream_of(dataset)
    return [sequence(stream, number) for number in range(700)]


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


def shard_tokens(dataset: Dataset, number: int) -> list[int]:
    shard = dataset.open_shard(number)
    return [token for chunk in range(len(shard.chunks)) for token in shard.read(chunk).tokens.tolist()]


def lane_tokens(dataset: Dataset, lane: int, count: int, **options: Any) -> list[int]:
    """The first `count` tokens of a lane, pieced together from its sequences."""
    stream = stream_of(dataset, **options)
    tokens: list[int] = []
    for k in range(-(-count // SEQUENCE_LENGTH)):
        read = sequence(stream, lane + k * LANES)
        assert tokens[-1:] in ([], [read[0]]), "the last token of a sequence is the first of the next"
        tokens[-1:] = read
    return tokens[:count]


@pytest.mark.parametrize("lane", [0, 4, 5, 7])
def test_every_document_once_per_epoch(dataset: Dataset, lane: int) -> None:
    shards = range(lane, SHARDS, LANES)
    epoch = sum(dataset.manifest.shards[shard].tokens for shard in shards)
    tokens = lane_tokens(dataset, lane, 3 * epoch)
    epochs = [tokens[e * epoch : (e + 1) * epoch] for e in range(3)]
    stored = sum((documents_of(shard_tokens(dataset, shard)) for shard in shards), Counter())
    assert [documents_of(tokens) for tokens in epochs] == [stored] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]  # each in an order of its own
    assert tokens != lane_tokens(dataset, lane, 3 * epoch, seed=8)


def test_orders_are_those_of_this_version() -> None:
    """Other ones would send every resumed run elsewhere: raise `order` in the fingerprint with them."""
    assert permutation(seed=7, purpose=1, epoch=3, index=2, length=8).tolist() == [2, 3, 6, 5, 1, 7, 4, 0]
    assert permutation(seed=7, purpose=2, epoch=3, index=2, length=8, part=1).tolist() == [0, 4, 7, 1, 3, 6, 5, 2]


@settings(deadline=None)
@given(numbers=st.lists(st.integers(0, 699), min_size=1, max_size=10))
def test_any_sequence_can_be_read_at_any_time(dataset: Dataset, in_order: list[list[int]], numbers: list[int]) -> None:
    stream = stream_of(dataset)
    assert [sequence(stream, number) for number in numbers] == [in_order[number] for number in numbers]


def test_positions_far_out_are_reached_at_once(dataset: Dataset) -> None:
    (batch,) = islice(reader_of(stream_of(dataset), start_step=10**15), 1)
    assert batch.tokens.shape == (1, SEQUENCE_LENGTH)


# The order of a run. 1,000 steps of 8 micro-batches, as the bytes of all token ids, in the order of the plan.

STEPS = 1000


def reader_of(stream: SequenceStream, **options: Any) -> MicroBatchReader:
    return MicroBatchReader(stream, **{**BATCHES, **options})


def run_of(datasets: list[Dataset], *, first: int = 0, steps: int, replicas: int = 1, **options: Any) -> list[bytes]:
    """The bytes of each step, read as the replicas would, each with a stream of its own."""
    readers = [
        reader_of(stream_of(*datasets), replica=r, replicas=replicas, start_step=first, **options)
        for r in range(replicas)
    ]
    micro_batches = BATCHES["micro_batches_per_step"]
    return [b"".join(ids_of(next(readers[q % replicas])) for q in range(micro_batches)) for _ in range(steps)]


def ids_of(batch: MicroBatch) -> bytes:
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (1, SEQUENCE_LENGTH)
    return batch.tokens.numpy().tobytes() + batch.labels.numpy().tobytes()


@pytest.fixture(scope="module")
def straight(dataset: Dataset, other: Dataset) -> list[bytes]:
    """A run through, over two sources."""
    steps = run_of([dataset, other], steps=STEPS)
    assert len(set(steps)) > STEPS * 0.9
    return steps


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_the_tokens_do_not_depend_on_the_replicas(
    dataset: Dataset, other: Dataset, straight: list[bytes], replicas: int
) -> None:
    assert run_of([dataset, other], steps=STEPS, replicas=replicas) == straight


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more processes than cores
@pytest.mark.parametrize(("workers", "replicas"), [(1, 1), (3, 1), (3, 2)])
def test_the_tokens_do_not_depend_on_the_processes(
    dataset: Dataset, other: Dataset, straight: list[bytes], workers: int, replicas: int
) -> None:
    assert run_of([dataset, other], steps=STEPS, replicas=replicas, workers=workers) == straight


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_the_tokens_do_not_depend_on_readers_that_are_killed(
    dataset: Dataset, straight: list[bytes], other: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a launcher that ends, or a host without memory; and nothing is raised in the middle of a step."""
    reader = reader_of(stream_of(dataset, other), workers=2)
    steps = [b"".join(ids_of(next(reader)) for _ in range(8)) for _ in range(3)]
    for child in psutil.Process().children():
        child.kill()
    time.sleep(0.5)  # no signal of their end is turned into an error here
    steps += [b"".join(ids_of(next(reader)) for _ in range(8)) for _ in range(20)]
    assert steps == straight[:23]
    assert "a process that reads ahead was ended" in caplog.text


def test_readers_are_forked_before_they_know_where_to_begin(
    dataset: Dataset, straight: list[bytes], other: Dataset
) -> None:
    """So what a rank makes after its reader, the model above all, is not held by them too."""
    reader = reader_of(stream_of(dataset, other), workers=1)
    children = psutil.Process().children()
    for step in (5, 3):
        reader.go_to(step)
        assert [b"".join(ids_of(next(reader)) for _ in range(8)) for _ in range(2)] == straight[step : step + 2]
    assert children and psutil.Process().children() == children


def test_the_tokens_do_not_depend_on_stops(dataset: Dataset, other: Dataset, straight: list[bytes]) -> None:
    """20 random stops, each followed by another number of replicas."""
    generator = random.Random(0)
    cuts = [0, *sorted(generator.sample(range(1, STEPS), 20)), STEPS]
    resumed: list[bytes] = []
    for start, stop in pairwise(cuts):
        replicas = generator.choice([1, 2, 4, 8])
        resumed += run_of([dataset, other], first=start, steps=stop - start, replicas=replicas)
    assert resumed == straight


def test_micro_batches_hold_the_sequences_in_order(dataset: Dataset, in_order: list[list[int]]) -> None:
    reader = reader_of(stream_of(dataset), micro_batch_size=2)
    rows = [
        [*tokens, labels[-1]]
        for batch in islice(reader, 20)
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
    ]
    assert rows == in_order[: len(rows)]


def test_replicas_read_lanes_of_their_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes: set[int] = set()
    open_shard = Dataset.open_shard

    def watched(self: Dataset, number: int) -> Any:
        lanes.add(number % LANES)
        return open_shard(self, number)

    monkeypatch.setattr(Dataset, "open_shard", watched)
    for replica in range(4):
        lanes.clear()
        for _ in islice(reader_of(stream_of(dataset), micro_batch_size=2, replica=replica, replicas=4), 100):
            pass
        assert lanes == {2 * replica, 2 * replica + 1}


def test_a_document_longer_than_a_sequence_and_an_epoch_shorter_than_one(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [[[*range(3, 103)]]])
    expected = [*range(3, 103), EOS] * 6
    reader = reader_of(stream_of(data, sequence_length=30, lanes=1))
    assert torch.cat([batch.tokens[0] for batch in islice(reader, 20)]).tolist() == expected[:600]
    batch = next(reader_of(stream_of(data, sequence_length=500, lanes=1)))
    assert batch.tokens[0].tolist() == expected[:500] and batch.labels[0].tolist() == expected[1:501]


# Several sources.


@settings(deadline=None)
@given(
    # In hundredths they repeat after at most MAX_PERIOD sequences.
    weights=st.lists(st.integers(1, 40) | st.decimals("0.05", "2", places=2).map(float), min_size=1, max_size=4).filter(
        lambda weights: 100 * sum(weights) <= MAX_PERIOD
    ),
    lane=st.integers(0, 1000),
    start=st.integers(0, 5000),
)
def test_proportions_are_exact(weights: list[float], lane: int, start: int) -> None:
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)})
    ks = range(start, start + mixture.period)
    located = [mixture.locate(lane, k) for k in ks]
    counts = Counter(source for source, _ in located)
    total = sum(weights)
    for source, weight in enumerate(weights):
        assert counts[source] == mixture.counts[source] == pytest.approx(mixture.period * weight / total)
        # each source is read on, sequence by sequence
        places = [place for s, place in located if s == source]
        assert places == list(range(places[0], places[0] + len(places)))
    assert mixture.locate(lane, 0)[1] == 0
    # never more than a sequence per source away from the share
    so_far = Counter[int]()
    for k in range(min(mixture.period, 200)):
        so_far[mixture.locate(0, k)[0]] += 1
        for source, weight in enumerate(weights):
            assert abs(so_far[source] - (k + 1) * weight / total) <= len(weights)


@settings(deadline=None, max_examples=50)
@given(
    phases=st.lists(st.tuples(st.integers(0, 300), st.tuples(*[st.integers(0, 4)] * 3).filter(any)), max_size=3),
    lanes=st.integers(1, 9),
)
def test_mixtures_that_follow_one_another(phases: list[tuple[int, tuple[int, ...]]], lanes: int) -> None:
    """Each has its own proportions, and every source is read on where it was, in each lane."""
    changes = dict([(0, (1, 2, 1)), *phases])
    weights = {str(s): {first: float(row[s]) for first, row in changes.items()} for s in range(3)}
    mixtures = Mixtures(weights, lanes)
    read: Counter[tuple[int, int]] = Counter()
    counts: dict[int, Counter[int]] = {first: Counter() for first in changes}
    for number in range(600):
        k, lane = divmod(number, lanes)
        source, place = mixtures.locate(lane, k)
        assert place == read[source, lane]
        read[source, lane] += 1
        counts[max(first for first in changes if first <= number)][source] += 1
    for first, found in counts.items():
        for source, weight in enumerate(changes[first]):
            share = found.total() * weight / sum(changes[first])
            assert abs(found[source] - share) <= 2 * lanes * (weight > 0), (first, found)


def test_one_mixture_is_what_it_was() -> None:
    weights = {"a": 0.7, "b": 0.3, "c": 1.5}
    alone = Mixture(weights)
    mixtures = Mixtures({name: {0: weight} for name, weight in weights.items()}, 16)
    assert all(mixtures.locate(lane, k) == alone.locate(lane, k) for lane in range(16) for k in range(100))


def test_a_mixture_reads_every_source_as_if_alone(dataset: Dataset, other: Dataset) -> None:
    mixed = stream_of(dataset, other, weights=(0.25, 0.75))
    assert mixed.source_of(0) == "source-1"
    streams = {"source-0": stream_of(dataset), "source-1": stream_of(other)}
    read: Counter[tuple[str, int]] = Counter()
    for number in range(400):
        source, lane = mixed.source_of(number), number % LANES
        place = read[source, lane]
        assert sequence(mixed, number) == sequence(streams[source], lane + place * LANES)
        read[source, lane] += 1
    assert {source: sum(n for (s, _), n in read.items() if s == source) for source in streams} == {
        "source-0": 100,
        "source-1": 300,
    }
    for first in range(0, 80, 4):  # batches are mixed too
        assert [mixed.source_of(first + row) for row in range(4)].count("source-0") == 1


def test_weights_that_change_over_a_run(dataset: Dataset, other: Dataset) -> None:
    """At the first sequence of the step in which they change; a number means what it did before schedules."""
    keys: dict[str, Any] = {"tokenizer": "", "validation": "", "sequence_length": SEQUENCE_LENGTH, "lanes": LANES}
    paths = {"a": {"path": dataset.location}, "b": {"path": other.location}}
    train = TrainConfig(
        output_dir="", steps=10, global_batch_size=12, micro_batch_size=1, learning_rate=1.0, schedule_steps=20
    )

    def sequences(weight: Any, train: TrainConfig | None = train) -> SequenceStream:
        sources = {**paths, "b": {**paths["b"], "weight": weight}}
        return training_sequences(DataConfig.model_validate({**keys, "train": sources}), 7, train)

    changing = sequences({"points": [[0.25, 0.0], [0.25, 3.0], [0.5, 3.0], [0.5, 1.0]]})
    names = [changing.source_of(number) for number in range(200)]
    assert set(names[:60]) == {"a"} and names[60:120].count("b") == 45 and names[120:200].count("b") == 40
    assert changing.fingerprint()["sources"]["b"]["later_weights"] == [[60, 3.0], [120, 1.0]]
    assert sequences({"points": [[5, 0.0], [5, 3.0]], "unit": "steps"}).source_of(59) == "a"
    assert "later_weights" not in str(sequences(2.0, None).fingerprint())
    with pytest.raises(UserError, match=r"data.train.b.weight changes over the run, but .* no whole train section"):
        sequences({"points": [[0.25, 0.0], [0.25, 3.0]]}, None)
    with pytest.raises(UserError, match=r"all weights of data.train are 0 from sequence 24 on"):
        Mixtures({"a": {0: 1.0, 24: 0.0}}, LANES)


@pytest.mark.parametrize(
    "content", [b"null", b"", b"[" * 100_000, b"\xff\xfe", b'{"format_version": 2}', None], ids=range(6)
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """None of these keeps a command waiting either."""
    write_dataset(tmp_path / "data", [[[7, 8, 9]]])
    manifest = tmp_path / "data/manifest.json"
    manifest.unlink()
    if content is None:
        os.mkfifo(manifest)
    else:
        manifest.write_bytes(content)
    with pytest.raises(UserError, match=r"data/manifest.json"):
        Dataset.open(tmp_path / "data")


def test_sources_that_do_not_fit_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    foreign = write_dataset(tmp_path / "foreign", draw_documents(3, 50), train_tokenizer(CODE, vocab_size=501))
    with pytest.raises(UserError, match=rf"made with tokenizer {TOKENIZER.sha256[:12]}, but .*foreign with "):
        stream_of(dataset, foreign)
    with pytest.raises(UserError, match=r"repeat only after 10000001 sequences, more than 10000; give them with fewer"):
        stream_of(dataset, dataset, weights=(1e-7, 1.0))
    with pytest.raises(UserError, match=r"repeat only after 100000000000000000001 sequences, .*, or less far apart"):
        stream_of(dataset, dataset, weights=(1e-20, 1.0))


# Documents.


def test_separate_documents(dataset: Dataset) -> None:
    stream = stream_of(dataset, separate_documents=True)
    plain = stream_of(dataset)
    for number in range(50):
        rows, joined = stream.read(number, 2), plain.read(number, 2)
        assert rows.documents is not None and joined.documents is None
        assert (rows.tokens == joined.tokens).all()
        ends = rows.tokens == EOS
        assert (rows.labels == np.where(ends, IGNORED, joined.labels)).all()
        documents = torch.from_numpy(rows.documents)
        assert (documents[:, 0] == 0).all()
        assert torch.equal(documents.diff(dim=1) == 1, torch.from_numpy(ends[:, :-1]))
        plain_sequences = torch.from_numpy(np.c_[joined.tokens, joined.labels[:, -1:]])
        same = MicroBatch.of(plain_sequences, separate_at=EOS)
        assert torch.equal(same.labels, torch.from_numpy(rows.labels))
        assert same.documents is not None and torch.equal(same.documents, documents)


# What goes wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lanes": 14}, r"train has 13 shards, fewer than data.lanes 14; use at most 13 lanes, or .* --shards 14"),
        ({"lanes": 6, "replicas": 4}, r"data.lanes 6 must be a multiple of micro-batch size x replicas = 2 x 4"),
        ({"micro_batches_per_step": 6, "replicas": 4}, "6 micro-batches of a step cannot be shared by 4 replicas"),
    ],
)
def test_what_does_not_fit_is_refused(dataset: Dataset, options: dict[str, Any], message: str) -> None:
    order = {key: options.pop(key) for key in SETTINGS if key in options}
    with pytest.raises(UserError, match=message):
        reader_of(stream_of(dataset, **order), **{"micro_batch_size": 2, **options})


@pytest.fixture
def damaged(dataset: Dataset, tmp_path: Path) -> Path:
    """A copy of the data set with a flipped bit in the first chunk of shard 2, which is one of lane 2."""
    folder = Path(shutil.copytree(dataset.location, tmp_path / "damaged"))
    shard = folder / "shard-00002.tar"
    data = bytearray(shard.read_bytes())
    data[dataset.open_shard(2).chunks[0].start] ^= 1
    shard.write_bytes(data)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_stops_a_run_in_its_place(damaged: Path, workers: int) -> None:
    reader = reader_of(stream_of(Dataset.open(damaged)), micro_batch_size=2, workers=workers)
    next(reader)  # lanes 0 and 1
    with pytest.raises(UserError, match=r"^shard .*shard-00002.tar is damaged: chunk 0 at byte 512: its bytes do not"):
        list(islice(reader, 100))


@pytest.mark.parametrize("what", ["bit", "index", "shard"])
@pytest.mark.parametrize("replicas", [1, 4])
def test_damage_can_be_skipped_and_nothing_else_moves(
    dataset: Dataset, damaged: Path, what: str, replicas: int
) -> None:
    sound = dataset.open_shard(2)
    lost = sound.chunks[0].tokens
    if what == "index":
        (damaged / "shard-00002.json").write_text("{")
    elif what == "shard":
        (damaged / "shard-00002.tar").unlink()
    if what != "bit":
        lost = dataset.manifest.shards[2].tokens
    data = Dataset.open(damaged, check_sizes=False)
    epoch = dataset.manifest.shards[2].tokens + dataset.manifest.shards[10].tokens
    steps = 2 * epoch // SEQUENCE_LENGTH + 1
    whole = [reader_of(stream_of(dataset), replica=r, replicas=replicas) for r in range(replicas)]
    skipping = [
        reader_of(stream_of(data, skip_damage=True), replica=r, replicas=replicas, workers=r % 2)
        for r in range(replicas)
    ]
    lost_tokens, sentences = 0, set()
    for q in range(steps * 8):
        expected, got = next(whole[q % replicas]), next(skipping[q % replicas])
        is_lost = got.labels == IGNORED
        assert int(is_lost.sum()) == got.lost_tokens
        assert torch.equal(got.labels[~is_lost], expected.labels[~is_lost])
        if q % 8 != 2:
            assert not got.lost_tokens and torch.equal(got.tokens, expected.tokens)
        lost_tokens += got.lost_tokens
        sentences |= set(got.damage)
    # The lane was read for two epochs and at most a sequence more; the first token of a run is no label.
    assert 2 * lost - 1 <= lost_tokens <= 2 * lost + 2 * SEQUENCE_LENGTH
    assert all("shard-00002" in sentence for sentence in sentences) and sentences


def test_the_fingerprint_tells_what_decides_the_order(dataset: Dataset, other: Dataset, tmp_path: Path) -> None:
    def fingerprint(*datasets: Dataset, **options: Any) -> dict[str, Any]:
        return stream_of(*datasets, **options).fingerprint()

    same = fingerprint(dataset)
    moved = Dataset.open(shutil.copytree(dataset.location, tmp_path / "moved"))
    assert same == fingerprint(moved)
    changes: list[tuple[tuple[Dataset, ...], dict[str, Any], str]] = [
        ((dataset,), {"seed": 8}, "seed"),
        ((dataset,), {"lanes": 4}, "lanes"),
        ((dataset,), {"sequence_length": 25}, "sequence_length"),
        ((dataset,), {"separate_documents": True}, "documents"),
        ((other,), {}, "sources"),
        ((dataset, other), {}, "sources"),
        ((dataset,), {"weights": (2,)}, "sources"),
    ]
    for datasets, options, key in changes:
        changed = fingerprint(*datasets, **options)
        assert {name for name in same if same[name] != changed[name]} == {key}


def test_the_state_is_small_for_thousands_of_lanes(tmp_path: Path) -> None:
    """The state of a run is its step and this fingerprint."""
    data = write_dataset(tmp_path / "data", [[[3]]] * 4096)
    stream = stream_of(data, lanes=4096)
    assert len(json.dumps(stream.fingerprint())) < 1000
    assert sequence(stream, 4096 * 10**6 + 77) == [3, EOS] * 12 + [3]


def test_held_out_sequences_are_spread_and_predict_each_token_once(dataset: Dataset) -> None:
    stored = [token for number in range(SHARDS) for token in shard_tokens(dataset, number)]
    available = (len(stored) - 1) // 10
    sequences = validation_sequences(dataset, sequence_length=10, num_sequences=available)
    assert sequences.shape == (available, 11)
    assert sequences.dtype == torch.int64
    assert sequences[:, 1:].flatten().tolist() == stored[1 : available * 10 + 1]
    assert torch.equal(sequences[:-1, -1], sequences[1:, 0])
    few = validation_sequences(dataset, sequence_length=10, num_sequences=3)
    assert torch.equal(few, sequences[[0, available // 3, available * 2 // 3]])
    with pytest.raises(UserError, match=rf"holds {available} sequences of 10 tokens, but {available + 1} are asked"):
        validation_sequences(dataset, sequence_length=10, num_sequences=available + 1)
