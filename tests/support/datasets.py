"""Data sets of tokens that a test chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from skvr_dist.data.prepare import writer
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.prepare.writer import ShardWriter, write_manifest
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.train import train_tokenizer

CODE = [document for document in open_corpus("stdlib") if document.id.startswith("json/")]


TOKENIZER = train_tokenizer(CODE, vocab_size=500)


EOS = TOKENIZER.eos_id


def write_dataset(folder: Path, shards: list[list[list[int]]], tokenizer: Tokenizer = TOKENIZER) -> Dataset:
    """A data set of these documents, each a list of tokens without the last."""
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK_TOKENS", 150)
        for number, documents in enumerate(shards):
            with ShardWriter(folder / f"shard-{number:05d}.tar", tokenizer) as shard:
                for place, tokens in enumerate(documents):
                    shard.write(f"{number}.{place}", [*tokens, EOS], text_bytes=1)
                shard.publish()
    write_manifest(folder, tokenizer)
    return Dataset.open(folder)
