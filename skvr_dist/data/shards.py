"""Data sets on disk: tar shards of token ids and a manifest.

    FOLDER/shard-00000.tar ...   webdataset shards, a member per document: `KEY.tokens`, its token ids as raw
                                 little-endian uint16 or uint32, the last one the end-of-sequence token
    FOLDER/manifest.json         the counts and checksums of every shard; written last

KEY is the document's id, percent-encoded with its dots, because webdataset ends a key at the first dot.
`skvr_dist.data.writer` writes them.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

from skvr_dist.errors import UserError
from skvr_dist.section import Section

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MEMBER = "tokens"
"""Suffix of a document's member in its shard."""

TokenType = Literal["uint16", "uint32"]


class Shard(Section):
    """A shard file and what it must hold."""

    file: str
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    bytes: int = Field(gt=0)
    """Size of the file."""
    sha256: str


class Manifest(Section):
    """What a data set holds and what it was made from."""

    format_version: int
    token_type: TokenType
    vocab_size: int = Field(gt=0)
    """Entries of the tokenizer's vocabulary; every token id is below."""
    eos_id: int = Field(ge=0)
    """Last token of every document."""
    tokenizer_sha256: str
    corpus_sha256: str
    """Hash of the ids and texts of all documents that went into training and held-out set together."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of the documents that were held out of the training set."""
    text_bytes: int = Field(gt=0)
    """Length of the documents as UTF-8, to convert a loss per token to bits per byte."""
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    shards: tuple[Shard, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for total in ("documents", "tokens"):
            parts = sum(getattr(shard, total) for shard in self.shards)
            if parts != getattr(self, total):
                raise ValueError(f"{total} is {getattr(self, total)}, but the shards hold {parts}")
        if self.vocab_size > vocabulary_limit(self.token_type):
            raise ValueError(f"vocab_size {self.vocab_size} does not fit token_type {self.token_type}")
        return self


def vocabulary_limit(token_type: TokenType) -> int:
    return int(np.iinfo(token_type).max) + 1


def smallest_token_type(vocab_size: int) -> TokenType:
    """The smallest integer type that holds every token id of a vocabulary."""
    return "uint16" if vocab_size <= vocabulary_limit("uint16") else "uint32"


def on_disk(token_type: TokenType) -> np.dtype[np.unsignedinteger[Any]]:
    """The type with the byte order of the files, whatever the machine's."""
    return np.dtype(token_type).newbyteorder("<")


class ShardTokens(NamedTuple):
    """The content of one shard, in stored order."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Token ids of all documents [tokens of the shard]."""
    offsets: NDArray[np.int64]
    """Document i is tokens[offsets[i] : offsets[i + 1]]; [documents + 1]."""


@dataclass(frozen=True)
class Dataset:
    """A complete data set; `open` it."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read the manifest and see that its shards are there in full size.

        Raises:
            UserError: no (complete) data set there, an unreadable manifest, or a shard that is missing or of another
                size.
        """
        folder = Path(folder)
        dataset = cls(folder, read_manifest(folder))
        for shard in dataset.manifest.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.exists() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"shard {path} {found}, but its manifest names {shard.bytes} bytes; {_RESTORE}")
        return dataset

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuse a model with too few embeddings for the tokens of this data set."""
        if self.manifest.vocab_size > vocab_size:
            raise UserError(
                f"data set {self.folder} has a vocabulary of {self.manifest.vocab_size}, but model.vocab_size is "
                f"{vocab_size}; it must be at least as large"
            )

    def require_same_tokenizer(self, other: Dataset) -> None:
        """Refuse two data sets whose token ids mean different things."""
        mine, others = self.manifest.tokenizer_sha256, other.manifest.tokenizer_sha256
        if mine != others:
            raise UserError(
                f"data set {self.folder} was made with tokenizer {mine[:12]}, but {other.folder} with {others[:12]}; "
                f"prepare both with the same one"
            )

    def read_shard(self, index: int) -> ShardTokens:
        """Read a shard whole and compare it with the manifest.

        Raises:
            UserError: the shard cannot be read, is damaged, or disagrees with the manifest.
        """
        shard = self.manifest.shards[index]
        path = self.folder / shard.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read shard {path}: {error.strerror}") from None
        try:
            return _unpack(data, shard, self.manifest)
        except _DamageError as damage:
            raise UserError(f"shard {path} is damaged: {damage}; {_RESTORE}") from None


_RESTORE = "copy it again from its source, or prepare the data set anew"


class _DamageError(Exception):
    """What is wrong with a shard."""


def _unpack(data: bytes, shard: Shard, manifest: Manifest) -> ShardTokens:
    # The checksum costs a tenth of the time; without it a flipped bit would be trained on.
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise _DamageError(f"its {len(data)} bytes do not have the checksum that the manifest names")
    token_type = on_disk(manifest.token_type)
    parts: list[bytes] = []
    try:
        # Of webdataset, the part below the opening of files: the bytes are here already, for the checksum.
        members = tar_file_expander([{"url": shard.file, "stream": io.BytesIO(data)}])
        for sample in group_by_keys(members):
            part = sample.get(MEMBER, b"")
            if not part or len(part) % token_type.itemsize:
                raise _DamageError(
                    f"member {sample['__key__']}.{MEMBER} has {len(part)} bytes, which are no {token_type.name}s"
                )
            parts.append(part)
    except _DamageError:
        raise
    except Exception as error:  # webdataset passes on whatever tarfile raises, with arguments of its own
        raise _DamageError(f"it is no readable tar file ({type(error).__name__})") from None
    tokens = np.frombuffer(b"".join(parts), dtype=token_type)
    for what, found, named in (("documents", len(parts), shard.documents), ("tokens", len(tokens), shard.tokens)):
        if found != named:
            raise _DamageError(f"it holds {found} {what}, but the manifest names {named}")
    if tokens.max() >= manifest.vocab_size:
        raise _DamageError(f"it holds token {tokens.max()}, outside the vocabulary of {manifest.vocab_size}")
    lengths = [len(part) // token_type.itemsize for part in parts]
    return ShardTokens(tokens, np.cumsum([0, *lengths]))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set; its shards are not looked at.

    Raises:
        UserError: it is missing, unreadable or of another format version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text)["format_version"]
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no complete data set ({MANIFEST} is missing); make one with tools/prepare_data.py"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):  # not UTF-8, not JSON, no such key, no keys at all
        raise UserError(f"{path} is not the manifest of a data set; {_RESTORE}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, but this version of skvr_dist reads {FORMAT_VERSION}; prepare the "
            f"data set anew"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path} is not valid: {place}{reason}; {_RESTORE}") from None


def find_datasets(folder: str | Path) -> dict[str, Dataset]:
    """The data set in a folder, or the training and held-out ones in the output of `tools/prepare_data.py`, by name.

    The shards are not looked at. Raises `UserError` as `read_manifest` does.
    """
    folder = Path(folder)
    if not (folder / "train").is_dir():
        return {folder.name: Dataset(folder, read_manifest(folder))}
    train = Dataset(folder / "train", read_manifest(folder / "train"))
    if not train.manifest.validation_share:
        return {"train": train}
    return {"train": train, "validation": Dataset(folder / "validation", read_manifest(folder / "validation"))}


def check_dataset(dataset: Dataset) -> list[str]:
    """Read everything; one sentence for each shard that is not as it should be."""
    problems = []
    for index, shard in enumerate(tqdm(dataset.manifest.shards, unit=" shards", leave=False)):
        try:
            tokens, offsets = dataset.read_shard(index)
        except UserError as error:
            problems.append(str(error))
            continue
        open_ended = int((tokens[offsets[1:] - 1] != dataset.manifest.eos_id).sum())
        if open_ended:
            problems.append(
                f"shard {dataset.folder / shard.file}: {open_ended} documents do not end with token "
                f"{dataset.manifest.eos_id}"
            )
    return problems
