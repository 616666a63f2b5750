"""From documents to a training and a held-out data set.

The documents are tokenised by one process per core, yet written in their own order: the result does not depend on
the number of processes.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.shards import MANIFEST, Dataset, find_datasets, smallest_token_type
from skvr_dist.data.sources import Document, document_fraction
from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.data.writer import DatasetWriter
from skvr_dist.errors import UserError

TOKENIZER_FILE = "tokenizer.model"

# Work is handed out in batches of about this size: milliseconds of messages for a tenth of a second of work.
_BATCH_CHARS = 250_000
_BATCHES_PER_WORKER = 4

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Tokens = NDArray[np.unsignedinteger[Any]]


class Prepared(NamedTuple):
    """The data sets by the name of their folder; not `written` if they were there already."""

    datasets: dict[str, Dataset]
    written: bool


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    output: str | Path,
    *,
    num_shards: int,
    validation_share: float = 0.0,
    workers: int | None = None,
) -> Prepared:
    """Write `output/train`, `output/validation` (unless its share is 0) and `output/tokenizer.model`.

    A document is held out when the hash of its id falls into `validation_share`, so it stays held out when others
    come and go. Held-out shards are about as large as training shards. If `output` holds these very data sets
    already, the documents are read to see that, and nothing is written.

    Args:
        num_shards: shards of the training set.
        workers: processes; None takes every core this one may run on.

    Raises:
        UserError: `output` holds something else, or too few documents for the shards; then nothing new is left there
            but the tokenizer.
    """
    workers = _cores() if workers is None else workers
    if num_shards < 1 or workers < 1:
        raise UserError(f"--shards {num_shards} and --workers {workers} must be positive")
    if not 0 <= validation_share < 1:
        raise UserError(f"--validation-share {validation_share} must be at least 0 and below 1")
    output = Path(output)
    if (output / "train" / MANIFEST).exists():
        return Prepared(_existing(documents, tokenizer, output, num_shards, validation_share), written=False)
    tokenizer.save(output / TOKENIZER_FILE)
    held_out_shards = {"validation": max(1, round(num_shards * validation_share))} if validation_share else {}
    digest = _CorpusDigest()
    try:
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(DatasetWriter(output / split, num_shards=shards, tokenizer=tokenizer))
                for split, shards in {**held_out_shards, "train": num_shards}.items()
            }
            for document, tokens in _tokenise(digest.over(documents), tokenizer, workers):
                held_out = document_fraction(document.id, "validation") < validation_share
                writers["validation" if held_out else "train"].write(
                    document.id, tokens, text_bytes=len(document.text.encode())
                )
            for writer in writers.values():
                writer.finish(corpus_sha256=digest.hexdigest(), validation_share=validation_share)
            # Training comes last: where its data set is, the held-out one is too.
            for writer in writers.values():
                writer.publish()
    except OSError as error:
        raise UserError(f"cannot write data set {output}: {error}") from None
    return Prepared(_open_all(output), written=True)


def _open_all(output: Path) -> dict[str, Dataset]:
    return {name: Dataset.open(found.folder) for name, found in find_datasets(output).items()}


def _existing(
    documents: Iterable[Document], tokenizer: Tokenizer, output: Path, num_shards: int, validation_share: float
) -> dict[str, Dataset]:
    """The data sets in `output`, if this call would make the same."""
    found = _open_all(output)
    manifest = found["train"].manifest
    wanted = [
        ("tokenizer", manifest.tokenizer_sha256[:12], tokenizer.sha256[:12]),
        ("number of shards", len(manifest.shards), num_shards),
        ("validation share", manifest.validation_share, validation_share),
    ]
    if all(there == asked for _, there, asked in wanted):
        digest = _CorpusDigest()
        for _ in digest.over(documents):
            pass
        wanted.append(("corpus", manifest.corpus_sha256[:12], digest.hexdigest()[:12]))
    for what, there, asked in wanted:
        if there != asked:
            raise UserError(
                f"{output} holds a data set made with {what} {there}, not {asked}; remove it or choose another output"
            )
    return found


class _CorpusDigest:
    """Hash of the documents that pass through."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            for part in document:
                data = part.encode("utf-8", "surrogateescape")
                self._hash.update(len(data).to_bytes(8, "little") + data)
            yield document

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tokenise(documents: Iterable[Document], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Document, _Tokens]]:
    """Each document with its token ids and the end-of-sequence token, in order."""
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(tokenizer.model,)) as pool:
        encoded = _map_in_order(pool, _encode_batch, _batches(documents), workers * _BATCHES_PER_WORKER)
        for batch, tokens in encoded:
            yield from zip(batch, tokens, strict=True)


def _map_in_order(
    pool: ProcessPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item], in_flight: int
) -> Iterator[tuple[_Item, _Result]]:
    """(item, function(item)) in order; never more than `in_flight` items in memory, unlike with `pool.map`."""
    pending: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        pending.append((item, pool.submit(function, item)))
        if len(pending) == in_flight:
            done, future = pending.popleft()
            yield done, future.result()
    for done, future in pending:
        yield done, future.result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


_worker_tokenizer: Tokenizer


def _start_worker(model: bytes) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer(model)


def _encode_batch(documents: list[Document]) -> list[_Tokens]:
    tokenizer = _worker_tokenizer
    token_type = smallest_token_type(tokenizer.vocab_size)
    return [np.array([*tokenizer.encode(doc.text), tokenizer.eos_id], dtype=token_type) for doc in documents]
