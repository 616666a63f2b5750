"""Speed of the data path: reading, preparing, and what a training step waits for data.

    python tools/bench_data.py --json bench-data.json

Reading: tokens per second of one core, from local shards to micro-batches, for short and for long documents. Preparing:
its speed as a share of what sentencepiece alone reaches on all cores with the same texts. Data wait: share of the step
time of the quickstart's model, on one rank, with one process that reads ahead. Exit code 1: a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

from skvr_dist.config.load import load_config
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.tokenizers.base import Tokenizer, train_tokenizer
from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.lab.bench.data import preparing_times, random_dataset, reading_rates

READING_BOUND = 20e6
PREPARING_BOUND = 0.8
WAIT_BOUND = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/experiment/bench.yaml", metavar="FILE", help="for the data wait")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: 5)")
    parser.add_argument("--steps", type=int, default=20, help="steps whose data wait is taken (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    corpus = open_corpus("stdlib")
    tokenizer = train_tokenizer(corpus, vocab_size=512)
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for document_tokens, sequence_length in ((300, 256), (300, 4096), (10_000, 4096)):
            rates = reading_rates(
                folder / f"read-{document_tokens}-{sequence_length}",
                tokenizer,
                document_tokens=document_tokens,
                sequence_length=sequence_length,
                rounds=options.rounds,
            )
            rate = statistics.median(rates)
            what = f"reading documents of {document_tokens:,} tokens as sequences of {sequence_length:,}"
            rows.append([what, f"{rate / 1e6:.1f} M tokens/s per core", "at least 20", rate >= READING_BOUND])
            record[what] = rates
        texts = [document.text[at : at + 2000] for document in corpus for at in range(0, len(document.text), 2000)]
        times = preparing_times(folder / "prepare", 4 * texts, tokenizer, options.rounds)
        what = f"preparing / sentencepiece alone, {times.cores} cores, {times.text_bytes / 1e6:.0f} MB"
        rows.append([what, f"{times.ratio:.1%}", "at least 80 %", times.ratio >= PREPARING_BOUND])
        record[what] = {"prepare_seconds": times.prepare, "sentencepiece_seconds": times.sentencepiece}
        wait = data_wait(folder, tokenizer, options.config, options.overrides, options.steps)
        rows.append(["data wait in the step", f"{wait:.3%}", "below 1 %", wait < WAIT_BOUND])
        record["data wait in the step"] = wait
    passed = all(row[-1] for row in rows)
    shown = [[*row[:-1], "met" if row[-1] else "missed"] for row in rows]
    print(tabulate(shown, headers=["what", "measured", "bound", ""], tablefmt="github"))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


def data_wait(folder: Path, tokenizer: Tokenizer, config_file: str, overrides: list[str], steps: int) -> float:
    """The data wait of `config_file` over documents of 300 tokens."""
    random_dataset(folder / "train", tokenizer, document_tokens=300, tokens=4_000_000, shards=32)
    config = load_config([config_file], [*overrides, f"data.train={folder / 'train'}"])

    from skvr_dist.lab.bench.step import data_wait_share
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.batches import WatchedBatches, training_batches
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.inputs import training_sequences

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    batches = training_batches(config, training_sequences(config.data, config.train.seed), mesh, engine, first_step=0)
    return data_wait_share(config, engine, mesh, WatchedBatches(batches, logging.getLogger("skvr_dist")), steps)


if __name__ == "__main__":
    run_command(main)
