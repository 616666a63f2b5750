"""How fast data is read, and prepared compared with sentencepiece alone."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece

from skvr_dist.data.cores import available_cores
from skvr_dist.data.prepare.corpus import Corpus
from skvr_dist.data.prepare.formats import Advance
from skvr_dist.data.prepare.pool import run_tasks
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.prepare.writer import ShardWriter, write_manifest
from skvr_dist.data.reader import MicroBatchReader, SequenceStream, SourceData
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.base import Tokenizer

_READ_SHARDS, _READ_TOKENS = 8, 16_000_000
_TASKS_PER_CORE = 4


def random_dataset(folder: Path, tokenizer: Tokenizer, *, document_tokens: int, tokens: int, shards: int) -> Dataset:
    """A data set of random documents with half to one and a half times `document_tokens`."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(shards):
        with ShardWriter(folder / f"shard-{number:05d}.tar", tokenizer) as shard:
            written = 0
            while written < tokens // shards:
                length = int(generator.integers(document_tokens // 2, document_tokens * 3 // 2))
                ids = generator.integers(tokenizer.eos_id + 1, tokenizer.vocab_size, length).tolist()
                shard.write(str(written), [*ids, tokenizer.eos_id], text_bytes=1)
                written += length + 1
            shard.publish()
    write_manifest(folder, tokenizer)
    return Dataset.open(folder)


def reading_rates(
    folder: Path, tokenizer: Tokenizer, *, document_tokens: int, sequence_length: int, rounds: int
) -> list[float]:
    """Tokens per second of one core, from shards to micro-batches of 8 sequences, of each round over the data."""
    dataset = random_dataset(
        folder, tokenizer, document_tokens=document_tokens, tokens=_READ_TOKENS, shards=_READ_SHARDS
    )
    stream = SequenceStream(
        {"random": SourceData(dataset)}, sequence_length=sequence_length, lanes=_READ_SHARDS, seed=0
    )
    reader = MicroBatchReader(stream, micro_batch_size=8, micro_batches_per_step=1)
    micro_batches = _READ_TOKENS // (8 * sequence_length)
    rates = []
    for _ in range(rounds):
        started = time.process_time()  # this process's own: other users of the machine do not count
        tokens = sum(batch.tokens.numel() for batch in islice(reader, micro_batches))
        rates.append(tokens / (time.process_time() - started))
    return rates


@dataclass(frozen=True)
class PreparingTimes:
    """Seconds to prepare a data set and to tokenise the same texts with sentencepiece alone, taken in turn."""

    text_bytes: int
    cores: int
    prepare: list[float]
    sentencepiece: list[float]

    @property
    def ratio(self) -> float:
        """Share of sentencepiece's speed that preparing reaches: the median over neighbouring runs."""
        pairs = zip(self.prepare, self.sentencepiece, strict=True)
        return statistics.median(alone / whole for whole, alone in pairs)


def preparing_times(folder: Path, texts: Sequence[str], tokenizer: Tokenizer, rounds: int) -> PreparingTimes:
    """Prepare `texts` from a jsonl file on all cores; and in the same number of processes, and from memory, let
    sentencepiece encode them.
    """
    folder.mkdir(parents=True)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cores = available_cores()
    shards = cores * _TASKS_PER_CORE
    tasks = {number: slice(number, None, shards) for number in range(shards)}
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        started = time.perf_counter()
        prepare(Corpus(folder / "texts.jsonl"), tokenizer, folder / str(number), num_shards=shards)
        prepared = time.perf_counter()
        run_tasks(_Encode(texts, tokenizer.model), tasks, total_bytes=0, workers=cores)
        times[0].append(prepared - started)
        times[1].append(time.perf_counter() - prepared)
    return PreparingTimes(sum(len(text.encode()) for text in texts), cores, *times)


@dataclass(frozen=True)
class _Encode:
    """Task: what sentencepiece does alone."""

    texts: Sequence[str]
    model: bytes

    def __call__(self, _: int, share: slice, __: Advance) -> int:
        processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        return sum(map(len, processor.encode(list(self.texts[share]))))
