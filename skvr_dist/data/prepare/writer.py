"""Writing data sets: each shard chunk by chunk, under a temporary name until it is whole; the manifest last."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from skvr_dist.data.format import (
    FORMAT_VERSION,
    LENGTH_TYPE,
    MANIFEST,
    Chunk,
    Manifest,
    Shard,
    ShardIndex,
    on_disk,
    smallest_token_type,
)
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.files import PARTIAL_SUFFIX, sha256_of, write_whole

CHUNK_TOKENS = 2**20
"""Tokens after which a chunk is closed: what a lane of the reader holds in memory, 2 or 4 MiB."""


class _Placed(NamedTuple):
    """A chunk in the file; its checksum is taken when the file is whole."""

    start: int
    documents: int
    tokens: int
    names_bytes: int


class ShardWriter:
    """Writes a shard and its index; as a context manager, so that what is not published leaves nothing behind.

    Args:
        path: the shard to be, with the suffix .tar.
        tokenizer: what makes the tokens.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._token_type = on_disk(smallest_token_type(tokenizer.vocab_size))
        self._partial = path.with_name(path.name + PARTIAL_SUFFIX)
        # USTAR: every header is one block. Times are zero, so that equal data sets are equal files.
        self._tar = tarfile.open(self._partial, "w:", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._chunks: list[_Placed] = []
        self._text_bytes = 0
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._documents: list[bytes] = []
        self._lengths: list[int] = []
        self._names: list[str] = []
        self._tokens = 0

    @property
    def is_empty(self) -> bool:
        """Whether no document has been written yet."""
        return not (self._chunks or self._documents)

    def write(self, name: str, tokens: list[int], text_bytes: int) -> None:
        """Add a document.

        Args:
            name: where it comes from.
            tokens: its token ids, the last one the end-of-sequence token.
            text_bytes: length of its text as UTF-8.
        """
        # By way of an array: half the time of a list straight to numpy, which was a tenth of that of tokenising.
        ids = np.frombuffer(array("I", tokens), dtype=np.uintc)
        self._documents.append(ids.astype(self._token_type).tobytes())
        self._lengths.append(len(tokens))
        self._names.append(name)
        self._tokens += len(tokens)
        self._text_bytes += text_bytes
        if self._tokens >= CHUNK_TOKENS:
            self._write_chunk()

    def _write_chunk(self) -> None:
        key = f"{self._path.stem}-{len(self._chunks):06d}"  # no dot: webdataset ends a key at the first
        names = json.dumps(self._names).encode()
        start = self._tar.offset + tarfile.BLOCKSIZE
        self._add(f"{key}.tokens", b"".join(self._documents))
        self._add(f"{key}.lengths", np.array(self._lengths, dtype=LENGTH_TYPE).tobytes())
        self._add(f"{key}.names", names)
        self._chunks.append(_Placed(start, len(self._lengths), self._tokens, len(names)))
        self._start_chunk()

    def _add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def publish(self) -> ShardIndex:
        """Write what is left and give shard and index their names, the index last: where it is, the shard is whole.

        At least one document must have been written.
        """
        if self._documents:
            self._write_chunk()
        self._tar.close()
        with self._partial.open("rb") as file:
            chunks = []
            for placed in self._chunks:
                chunk = Chunk(**placed._asdict(), crc32=0)
                file.seek(chunk.start)
                crc32 = zlib.crc32(file.read(chunk.bytes(self._token_type.itemsize)))
                chunks.append(chunk.model_copy(update={"crc32": crc32}))
        shard = Shard(
            file=self._path.name,
            documents=sum(chunk.documents for chunk in chunks),
            tokens=sum(chunk.tokens for chunk in chunks),
            text_bytes=self._text_bytes,
            bytes=self._partial.stat().st_size,
            sha256=sha256_of(self._partial),
        )
        index = ShardIndex(shard=shard, tokenizer_sha256=self._tokenizer.sha256, chunks=tuple(chunks))
        self._partial.replace(self._path)
        write_whole(self._path.with_name(shard.index_file), index.model_dump_json(indent=1) + "\n")
        return index

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()  # ends the file, which a full disk refuses once more
        finally:
            self._partial.unlink(missing_ok=True)


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    corpus_sha256: str = "",
    validation_share: float = 0.0,
    left_out: Mapping[str, int] | None = None,
) -> None:
    """Make a data set of the published shards in a folder."""
    shards = tuple(
        ShardIndex.model_validate_json(file.read_bytes()).shard for file in sorted(folder.glob("shard-*.json"))
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        token_type=smallest_token_type(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        corpus_sha256=corpus_sha256,
        validation_share=validation_share,
        text_bytes=sum(shard.text_bytes for shard in shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        left_out=dict(left_out or {}),
        shards=shards,
    )
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
