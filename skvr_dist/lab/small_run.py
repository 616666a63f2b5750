"""A run small enough to be started many times: a little text of Python's standard library, and a tiny decoder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skvr_dist.config.presets import find_config
from skvr_dist.data.prepare.corpus import Corpus, open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.tokenizers.train import train_tokenizer

KEYS = {
    "model.num_hidden_layers": 4,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.warmup_steps": 1,
    "data.sequence_length": 64,
    "data.lanes": 4,
    "evaluate.every_steps": 2,
    "evaluate.sequences": 8,
    "checkpoint.every_steps": 2,
    "parallel.timeout_seconds": 60.0,
}
_STRETCH_LINES = 30


def make_data(folder: Path, package: str = "email", shards: int = 12) -> None:
    """Write a tokenizer and a small data set of the running Python's own source into a new folder.

    Args:
        package: of the standard library.
    """
    corpus = open_corpus(str(Path(os.__file__).parent / package), suffixes=(".py",))
    tokenizer = train_tokenizer(corpus, vocab_size=512, model_type="bpe")
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.model")
    # As stretches of lines, far more than shards: whole files are few, and another Python's leave some shard empty.
    stretches = folder / "stretches.jsonl"
    with stretches.open("w", encoding="utf-8") as file:
        for document in corpus:
            lines = document.text.splitlines(keepends=True)
            for start in range(0, len(lines), _STRETCH_LINES):
                file.write(json.dumps({"text": "".join(lines[start : start + _STRETCH_LINES])}) + "\n")
    prepare(Corpus(stretches), tokenizer, folder, num_shards=shards, validation_share=0.25, workers=1)


def arguments(output: Path, data: Path, **keys: Any) -> list[str]:
    """Arguments of the pretraining command.

    Args:
        data: a folder of `make_data`.
        keys: of the configuration, beside or instead of `KEYS`, with `__` for the dot.
    """
    values = KEYS | {
        "train.output_dir": output,
        "data.train": data / "train",
        "data.validation": data / "validation",
        "data.tokenizer": data / "tokenizer.model",
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    config = ["--config", str(find_config("experiment/quickstart"))]
    return [*config, *(f"{name}={value}" for name, value in values.items())]
