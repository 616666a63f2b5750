"""The streaming reader: which tokens each micro-batch holds, whatever the number of replicas and wherever it starts.

Sequence n of the run is sequence n // V of lane n % V. Sequence k of the lane of a source (`skvr_dist.data.order`) is
its tokens [k * S, k * S + S]: S + 1 of them, the last one the first of the next sequence. So the place of a run is a
number, and any sequence can be read without reading those before it.

Shapes: B sequences of a micro-batch, S sequence length, N sequences, Q micro-batches of a step, V lanes.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.data.order import Lane, Mixtures
from skvr_dist.data.shards import Dataset
from skvr_dist.errors import UserError


class Rows(NamedTuple):
    """Sequences as they are read: the fields of `MicroBatch` as arrays, cheap to pass between processes."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    documents: NDArray[np.int64] | None
    lost_tokens: int = 0
    damage: tuple[str, ...] = ()


class Sequences(Protocol):
    """The numbered sequences of a run."""

    @property
    def lanes(self) -> int:
        """Number of lanes, which must be a multiple of micro-batch size x replicas."""

    def read(self, first: int, size: int) -> Rows:
        """Sequences `first` to `first + size - 1`."""


class ExampleSet(Protocol):
    """Sequences of whole examples, epoch after epoch, by number (`skvr_dist.data.finetune.sequences`)."""

    @property
    def tokens(self) -> int:
        """Of all examples together."""

    @property
    def fingerprint(self) -> str:
        """Equal for two sets of the same examples."""

    def read(self, first: int, size: int) -> Rows:
        """Sequences `first` to `first + size - 1`, each position with the number of its example."""


class SourceData(NamedTuple):
    """A data set and its weight among the sources."""

    dataset: Dataset | ExampleSet
    weight: float = 1.0
    later_weights: Mapping[int, float] = MappingProxyType({})
    """Those that it has instead from a sequence on, by the sequence's number."""


class SequenceStream:
    """Every sequence of a run by its number.

    Args:
        sources: the training sets by name. Each of their shards belongs to one lane; of a set of examples, sequence k
            of lane v is its sequence k * V + v.
        sequence_length: S.
        lanes: V.
        seed: draws the order of shards, chunks and documents.
        separate_documents: a position attends to its own document only, and the end of one does not predict the next.
        skip_damage: leave out what is damaged, see `Lane`.

    Raises:
        UserError: fewer shards than lanes, different tokenizers, weights without a short pattern; and while reading,
            damage.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceData],
        *,
        sequence_length: int,
        lanes: int,
        seed: int,
        separate_documents: bool = False,
        skip_damage: bool = False,
    ) -> None:
        self.sources = dict(sources)
        self.sequence_length = sequence_length
        self.lanes = lanes
        self._seed = seed
        self._separate_documents = separate_documents
        self._damage: list[str] = []
        self._mixtures = Mixtures({name: {0: s.weight, **s.later_weights} for name, s in self.sources.items()}, lanes)
        self._sets = [source.dataset for source in self.sources.values()]
        self._eos_id = 0  # of no importance without shards
        datasets = self.datasets
        for dataset in datasets:
            shards = len(dataset.manifest.shards)
            if shards < lanes:
                raise UserError(
                    f"data set {dataset.location} has {shards} shards, fewer than data.lanes {lanes}; use at most "
                    f"{shards} lanes, or prepare it with --shards {lanes}"
                )
            datasets[0].require_same_tokenizer(dataset)
            self._eos_id = dataset.manifest.eos_id
        self._lanes = [
            [Lane(dataset, lane, lanes, seed, skip_damage=skip_damage, damage=self._damage) for lane in range(lanes)]
            if isinstance(dataset, Dataset)
            else []
            for dataset in self._sets
        ]

    @property
    def datasets(self) -> list[Dataset]:
        """The sources that are shards."""
        return [source.dataset for source in self.sources.values() if isinstance(source.dataset, Dataset)]

    @property
    def tokens_on_disk(self) -> int:
        """Tokens of all sources together."""
        sets = [source.dataset for source in self.sources.values()]
        return sum(each.manifest.tokens if isinstance(each, Dataset) else each.tokens for each in sets)

    def source_of(self, number: int) -> str:
        """Name of the source of sequence `number`."""
        k, lane = divmod(number, self.lanes)
        return list(self.sources)[self._mixtures.locate(lane, k)[0]]

    def read(self, first: int, size: int) -> Rows:
        """Sequences `first` to `first + size - 1`.

        Raises:
            DamageError: a chunk is damaged, unless it is to be skipped.
        """
        sequences = np.empty((size, self.sequence_length + 1), dtype=np.int64)
        lost = np.zeros(sequences.shape, dtype=bool)
        examples: dict[int, Rows] = {}
        for row in range(size):
            k, lane = divmod(first + row, self.lanes)
            source, place = self._mixtures.locate(lane, k)
            chosen = self._sets[source]
            if isinstance(chosen, Dataset):
                self._lanes[source][lane].read(place * self.sequence_length, sequences[row], lost[row])
            else:
                examples[row] = chosen.read(place * self.lanes + lane, 1)
                sequences[row] = self._eos_id
        tokens, labels = sequences[:, :-1], sequences[:, 1:]
        lost_tokens = int(lost[:, 1:].sum())
        documents = None
        if self._separate_documents or lost_tokens:
            labels = np.where(lost[:, 1:], IGNORED, labels)
        if self._separate_documents:
            ends = tokens == self._eos_id
            documents = np.cumsum(ends, axis=1) - ends
            labels[ends] = IGNORED
            for row, example in examples.items():
                assert example.documents is not None
                tokens[row], labels[row], documents[row] = example.tokens[0], example.labels[0], example.documents[0]
        damage, self._damage[:] = tuple(self._damage), []
        return Rows(tokens, labels, documents, lost_tokens, damage)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the sequences: equal fingerprints mean equal sequences at every number.

        The order of the sources counts, too.
        """
        return {
            "order": 2,  # raise it when the rules of reading change what a number means
            "sequence_length": self.sequence_length,
            "lanes": self.lanes,
            "seed": self._seed,
            "documents": "separate" if self._separate_documents else "joined",
            "sources": {
                name: {"weight": source.weight, **_later(source), _kind(source): source.dataset.fingerprint}
                for name, source in self.sources.items()
            },
        }


def _kind(source: SourceData) -> str:
    """What the fingerprint calls a source."""
    return "shards" if isinstance(source.dataset, Dataset) else "examples"


def _later(source: SourceData) -> dict[str, Any]:
    """What the fingerprint says of weights that change, in the form that JSON gives back."""
    later = sorted(source.later_weights.items())
    return {"later_weights": [[number, weight] for number, weight in later]} if later else {}


class MicroBatchReader(Iterator[MicroBatch]):
    """The micro-batches that one data-parallel replica runs, without end, on the CPU.

    Micro-batch q of step t holds sequences t * Q * B + q * B to t * Q * B + (q + 1) * B - 1 of the run. Replica r of
    R runs q = r, r + R, ... So no sequence changes with R, and each replica reads lanes of its own.

    The place of a run is the number of sequences that it has consumed, Q * B per step; `start_step` and `go_to` go
    there at once, and the fingerprint of the sequences tells whether the number still means the same.

    Processes that read ahead are forks of this one, with its memory as it is now: a weight that is updated after that
    is held twice. So a rank makes its reader before its model, and says where to begin once a checkpoint is read.

    Args:
        sequences: the sequences of the run; its lanes must suit B x R.
        micro_batch_size: B.
        micro_batches_per_step: Q, over all replicas.
        replica, replicas: r and R.
        start_step: the step of the first micro-batch.
        workers: processes that read ahead; 0 reads when asked. Worker w of W reads this replica's micro-batches w,
            w + W, ... A mistake that one meets is raised in its place.
        prefetch: micro-batches that each worker reads ahead.

    Raises:
        UserError: lanes or micro-batches that the replicas cannot share equally; and while reading, what the
            sequences raise.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        micro_batch_size: int,
        micro_batches_per_step: int,
        replica: int = 0,
        replicas: int = 1,
        start_step: int = 0,
        workers: int = 0,
        prefetch: int = 4,
    ) -> None:
        if sequences.lanes % (micro_batch_size * replicas):
            raise UserError(
                f"data.lanes {sequences.lanes} must be a multiple of micro-batch size x replicas = "
                f"{micro_batch_size} x {replicas}, so that each replica reads lanes of its own"
            )
        if micro_batches_per_step % replicas:
            raise UserError(f"{micro_batches_per_step} micro-batches of a step cannot be shared by {replicas} replicas")
        self._stride = replicas
        # A step has as many micro-batches for one replica as for another, so those of replica r are r, r + R, ... of
        # the whole run too.
        self._per_step, self._replica = micro_batches_per_step, replica
        self._dataset = _MicroBatches(sequences, micro_batch_size)
        self._workers = _Workers(self._dataset, workers, prefetch) if workers else None
        self.go_to(start_step)

    def go_to(self, step: int) -> None:
        """Read on at the first micro-batch of a step."""
        self._next = step * self._per_step + self._replica
        self._rows: Iterator[Rows | UserError] | None = None

    def _begin(self) -> Iterator[Rows | UserError]:
        numbers = count(self._next, self._stride)
        return self._workers.read(numbers) if self._workers else map(self._dataset.__getitem__, numbers)

    def __next__(self) -> MicroBatch:
        try:
            if self._rows is None:
                self._rows = self._begin()
            rows = next(self._rows)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            # The host has run out of memory, or a launcher that is told to end ends readers with their rank, which is
            # still to save. What they had read ahead is read again.
            reason = " ".join(str(error).split())
            logging.getLogger("skvr_dist").warning("a process that reads ahead was ended (%s); its rank reads", reason)
            self._workers = None
            self._rows = self._begin()
            rows = next(self._rows)
        if isinstance(rows, UserError):
            raise rows
        self._next += self._stride
        tokens, labels = torch.from_numpy(rows.tokens), torch.from_numpy(rows.labels)
        documents = None if rows.documents is None else torch.from_numpy(rows.documents)
        return MicroBatch(tokens, labels, documents, rows.lost_tokens, rows.damage)


class _Workers:
    """Processes that read micro-batches ahead, forked at once and idle until `read` names the first."""

    def __init__(self, dataset: _MicroBatches, workers: int, prefetch: int) -> None:
        self._numbers = _Numbers()
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._numbers,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=prefetch,
            persistent_workers=True,  # those of the first, empty pass, which forks them, read in the second
            worker_init_fn=_leave_interrupts,
        )
        before = signal.getsignal(signal.SIGCHLD)
        iter(self._loader)
        if threading.current_thread() is threading.main_thread():
            # torch has a handler raise the error wherever the rank is, in the middle of a step; without it, `next`
            # finds out for itself, within 5 s.
            signal.signal(signal.SIGCHLD, before)

    def read(self, numbers: Iterable[int]) -> Iterator[Rows | UserError]:
        """The micro-batches of these numbers, in order; this and `next` raise RuntimeError when a process was ended."""
        self._numbers.numbers = numbers
        return iter(self._loader)


class _Numbers(Iterable[int]):
    """The micro-batches that a pass of the workers reads; none at first."""

    numbers: Iterable[int] = ()

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def _leave_interrupts(_: int) -> None:
    """Leave Ctrl-C and SIGHUP, which a terminal sends to this worker too, to the run: it reads until it has saved."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class _MicroBatches(TorchDataset[Rows | UserError]):
    """The micro-batches of a run by number, each of `size` sequences."""

    def __init__(self, sequences: Sequences, size: int) -> None:
        self._sequences, self._size = sequences, size

    def __getitem__(self, number: int) -> Rows | UserError:
        try:
            return self._sequences.read(number * self._size, self._size)
        except UserError as error:  # as a value: the loader would bury its sentence in a traceback
            return error


def _unchanged(rows: Any) -> Any:
    return rows
