"""What is written on disk about a data set.

FOLDER/shard-00000.tar ...    webdataset shards; a sample is a chunk of documents: `KEY.tokens`, their token ids one
                              after the other as raw little-endian uint16 or uint32, each document ending with the
                              end-of-sequence token; `KEY.lengths`, tokens of each document as uint32; `KEY.names`,
                              the documents' names, a JSON list
FOLDER/shard-00000.json ...   the index of a shard: counts, checksums and where its chunks lie
FOLDER/manifest.json          the data set: its tokenizer, counts and shards; written last
FOLDER/../tokenizer.model     the tokenizer itself, beside the training and the held-out data set made with it
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from skvr_dist.errors import UserError
from skvr_dist.files import MANIFEST_FILE
from skvr_dist.section import Section

FORMAT_VERSION = 2
MANIFEST = MANIFEST_FILE
TOKENIZER_FILE = "tokenizer.model"
RESTORE = "copy it again from its source, or prepare the data set anew"

LENGTH_TYPE = np.dtype("<u4")
_TAR_BLOCK = 512  # a member is one block of header and its content, padded to whole blocks

TokenType = Literal["uint16", "uint32"]


class Chunk(Section):
    """Documents that are stored and read together."""

    start: int = Field(gt=0)
    """Byte of the shard at which the token ids begin."""
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    names_bytes: int = Field(gt=0)
    crc32: int = Field(ge=0)
    """Checksum of the bytes from the first token id to the last name."""

    def lengths_at(self, token_bytes: int) -> int:
        """Where the lengths begin, in bytes from `start`, if a token id has `token_bytes`."""
        return _padded(self.tokens * token_bytes) + _TAR_BLOCK

    def names_at(self, token_bytes: int) -> int:
        """Where the names begin, in bytes from `start`."""
        return self.lengths_at(token_bytes) + _padded(self.documents * LENGTH_TYPE.itemsize) + _TAR_BLOCK

    def bytes(self, token_bytes: int) -> int:
        """Length in bytes, from the first token id to the last name."""
        return self.names_at(token_bytes) + self.names_bytes


def _padded(size: int) -> int:
    return -(-size // _TAR_BLOCK) * _TAR_BLOCK


class Shard(Section):
    """A shard file and what it must hold."""

    file: str
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    text_bytes: int = Field(gt=0)
    """Length of the documents as UTF-8."""
    bytes: int = Field(gt=0)
    """Size of the file."""
    sha256: str

    @property
    def index_file(self) -> str:
        """File name of the shard's index."""
        return self.file.removesuffix(".tar") + ".json"


class ShardIndex(Section):
    """The index of a shard."""

    shard: Shard
    tokenizer_sha256: str
    chunks: tuple[Chunk, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ShardIndex:
        for total in ("documents", "tokens"):
            parts = sum(getattr(chunk, total) for chunk in self.chunks)
            if parts != getattr(self.shard, total):
                raise ValueError(f"{total} is {getattr(self.shard, total)}, but the chunks hold {parts}")
        return self


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
    """Hash of the names and texts of all documents that went into training and held-out set together."""
    validation_share: float = Field(ge=0, lt=1)
    """Share of the documents that were held out of the training set."""
    text_bytes: int = Field(gt=0)
    """Length of the documents as UTF-8, to convert a loss per token to bits per byte."""
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    left_out: dict[str, int]
    """Documents of the corpus that are in no data set, by reason; those of training and held-out set together."""
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
    """Token ids that an integer type can tell apart."""
    return int(np.iinfo(token_type).max) + 1


def smallest_token_type(vocab_size: int) -> TokenType:
    """The smallest integer type that holds every token id of a vocabulary."""
    return "uint16" if vocab_size <= vocabulary_limit("uint16") else "uint32"


def on_disk(token_type: TokenType) -> np.dtype[np.unsignedinteger[Any]]:
    """The numpy type of token ids in the files: little-endian on any machine."""
    return np.dtype(token_type).newbyteorder("<")


_Stored = TypeVar("_Stored", Manifest, ShardIndex)


def parse_stored(kind: type[_Stored], data: bytes, place: str) -> _Stored:
    """A manifest or an index from the content of its file.

    Raises:
        UserError: it is not valid, or contradicts itself.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{place} is not valid: {where}{reason}; {RESTORE}") from None


def parse_manifest(data: bytes, place: str) -> Manifest:
    """A manifest from the content of its file, if this release reads its format version.

    Raises:
        UserError: as for `parse_stored`, or the format version is another.
    """
    try:
        version = json.loads(data)["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):  # not UTF-8, not JSON, no such key, no keys, a knot
        raise UserError(f"{place} is not the manifest of a data set; {RESTORE}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{place} has format version {version}, but this version of skvr_dist reads {FORMAT_VERSION}; prepare the "
            f"data set anew"
        )
    return parse_stored(Manifest, data, place)
