"""The interface of tokenizers that the data path uses.

`skvr_dist.data.tokenizers.load` reads any kind, `train` makes one of ours.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from skvr_dist.errors import UserError
from skvr_dist.files import local_path, naming_failure, require_file, write_whole


class Tokenizer(ABC):
    """Turns texts into token ids and back; one file, which travels with data sets, checkpoints and exports."""

    model: bytes
    """Content of that file."""

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: the file is there already and holds another tokenizer, or cannot be written.
        """
        path = local_path(path)
        with naming_failure(path):
            if path.exists():
                require_file(path)
                if not self.is_same(path.read_bytes()):
                    raise UserError(f"{path} holds another tokenizer; remove it or choose another name")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model)

    def is_same(self, model: bytes) -> bool:
        """Whether the content of another file is this tokenizer."""
        return model == self.model

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text; nothing is added, and names of special tokens in a text are just text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are empty."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size of the vocabulary: every token id is below it."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Id of the token that ends every document of a data set."""

    @property
    def sha256(self) -> str:
        """Hash of the file, by which data sets name their tokenizer."""
        return hashlib.sha256(self.model).hexdigest()


def mean_the_same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether token ids mean the same to two tokenizers, whatever their files look like.

    So it is where an export of ours was imported again: what was a `.model` file is then a tokenizer.json. Compared are
    the texts of all ids, and the ids of these texts, alone and in a row, and of characters that are spelled in bytes.
    """
    if (one.vocab_size, one.eos_id) != (other.vocab_size, other.eos_id):
        return False
    pairs = [(one.decode([token]), other.decode([token])) for token in range(one.vocab_size)]
    if any(mine != others for mine, others in pairs if mine and others):  # the text of a special token is empty for one
        return False
    rare = "".join(map(chr, range(1, 0xD800, 61)))
    texts = [mine for mine, others in pairs if mine and others]
    return all(one.encode(text) == other.encode(text) for text in [*texts, "".join(texts), rare])


def spell_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids stand for the same texts, but for 1 %: releases of a tokenizer differ in their special tokens."""
    if one.sha256 == other.sha256:
        return True
    ids = range(min(one.vocab_size, other.vocab_size))
    texts = ((one.decode([token]), other.decode([token])) for token in ids)
    different = sum(mine != others for mine, others in texts if mine and others)
    return different <= 0.01 * len(ids)
