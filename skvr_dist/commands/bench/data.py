"""Speed of the data path: reading, preparing, and what a training step waits for data.

    skvr-bench data --json data.json

Reading: tokens per second of one core, from local shards to micro-batches, for short and for long documents. Preparing:
its speed as a share of what sentencepiece alone reaches on all cores with the same texts. Data wait: share of the step
time of the quickstart's model, on one rank, with one process that reads ahead. Exit code 1: a bound is missed.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate

from skvr_dist.command import Figure, add_configs, add_json, add_overrides, at_least, conclude

if TYPE_CHECKING:
    from skvr_dist.config.tree import Config
    from skvr_dist.data.prepare.corpus import Corpus
    from skvr_dist.data.tokenizers.base import Tokenizer

READING_BOUND = 20e6
PREPARING_BOUND = 0.8
WAIT_BOUND = 0.01
DOCUMENTS = ((300, 256), (300, 4096), (10_000, 4096))
"""Pairs of document length and sequence length, in tokens."""


class _Measured(NamedTuple):
    what: str
    value: str
    bound: str
    met: bool
    record: Any


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser, default="bench")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measurements of each kind (default: 5)")
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps whose data wait is taken (default: 20)")
    add_json(parser)
    add_overrides(parser)


def run(options: Namespace) -> int:
    """Measure all three; returns the exit code."""
    from skvr_dist.data.prepare.corpus import open_corpus
    from skvr_dist.data.tokenizers.train import train_tokenizer

    _config(options, "data")  # a mistake in it is met before anything is measured
    corpus = open_corpus("stdlib")
    tokenizer = train_tokenizer(corpus, vocab_size=512)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = [
            *_reading(folder, tokenizer, options.rounds),
            _preparing(folder, corpus, tokenizer, options.rounds),
            _waiting(folder, tokenizer, options),
        ]
    figures = [Figure(f"{each.what}: {each.value}", each.bound, each.met) for each in measured]
    rows = [[each.what, each.value, each.bound, figure.verdict] for each, figure in zip(measured, figures, strict=True)]
    return conclude(
        figures,
        table=tabulate(rows, headers=["what", "measured", "bound", ""], tablefmt="github"),
        record={each.what: each.record for each in measured},
        json_file=options.json,
    )


def _reading(folder: Path, tokenizer: Tokenizer, rounds: int) -> Iterator[_Measured]:
    from skvr_dist.lab.bench.data import reading_rates

    for document_tokens, sequence_length in DOCUMENTS:
        rates = reading_rates(
            folder / f"read-{document_tokens}-{sequence_length}",
            tokenizer,
            document_tokens=document_tokens,
            sequence_length=sequence_length,
            rounds=rounds,
        )
        rate = statistics.median(rates)
        what = f"reading documents of {document_tokens:,} tokens as sequences of {sequence_length:,}"
        yield _Measured(what, f"{rate / 1e6:.1f} M tokens/s per core", "at least 20", rate >= READING_BOUND, rates)


def _preparing(folder: Path, corpus: Corpus, tokenizer: Tokenizer, rounds: int) -> _Measured:
    from skvr_dist.lab.bench.data import preparing_times

    texts = [document.text[at : at + 2000] for document in corpus for at in range(0, len(document.text), 2000)]
    times = preparing_times(folder / "prepare", 4 * texts, tokenizer, rounds)
    what = f"preparing / sentencepiece alone, {times.cores} cores, {times.text_bytes / 1e6:.0f} MB"
    record = {"prepare_seconds": times.prepare, "sentencepiece_seconds": times.sentencepiece}
    return _Measured(what, f"{times.ratio:.1%}", "at least 80 %", times.ratio >= PREPARING_BOUND, record)


def _config(options: Namespace, train: str) -> Config:
    """The configuration, which reads that data set."""
    from skvr_dist.config.load import load_config

    return load_config(options.config, [*options.overrides, f"data.train={train}"])


def _waiting(folder: Path, tokenizer: Tokenizer, options: Namespace) -> _Measured:
    """The data wait of the configuration over documents of 300 tokens."""
    from skvr_dist.lab.bench.data import random_dataset
    from skvr_dist.lab.bench.step import data_wait_share
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.batches import WatchedBatches, open_reader, training_batches
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.inputs import training_sequences

    random_dataset(folder / "train", tokenizer, document_tokens=300, tokens=4_000_000, shards=32)
    config = _config(options, str(folder / "train"))
    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    reader = open_reader(config, training_sequences(config.data, config.train.seed, config.train), mesh)
    engine = build_engine(config, mesh)
    batches = training_batches(config, reader, mesh, first_step=0)
    watched = WatchedBatches(batches, logging.getLogger("skvr_dist"))
    wait = data_wait_share(config, engine, watched, options.steps)
    return _Measured("data wait in the step", f"{wait:.3%}", "below 1 %", wait < WAIT_BOUND, wait)
