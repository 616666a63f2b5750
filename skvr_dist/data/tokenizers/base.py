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
