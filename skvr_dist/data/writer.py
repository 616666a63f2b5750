"""Writing a data set: documents dealt to shards, the manifest last, nothing visible before it is whole.

A data set is written into `FOLDER.partial` and renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import heapq
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter

from skvr_dist.data.shards import FORMAT_VERSION, MANIFEST, MEMBER, Manifest, Shard, on_disk, smallest_token_type
from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.errors import UserError


@dataclass
class _OpenShard:
    path: Path
    file: BinaryIO
    tar: TarWriter
    documents: int = 0
    tokens: int = 0

    def close(self) -> Shard:
        self.tar.close()
        self.file.close()
        data = self.path.read_bytes()
        return Shard(
            file=self.path.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )


class DatasetWriter:
    """Writes a data set; as a context manager, so that an exception leaves nothing behind.

    Each document goes to the shard with the fewest tokens so far: shards of nearly equal size, and the same ones for
    the same documents in the same order.

    Args:
        folder: the data set to be, which must not exist.
        num_shards: shard files, all open at once.
        tokenizer: what made the tokens.

    Raises:
        UserError: the folder exists, or not that many files can be open.
    """

    def __init__(self, folder: Path, *, num_shards: int, tokenizer: Tokenizer) -> None:
        if folder.exists():
            raise UserError(f"{folder} is there already; remove it or choose another output")
        self.folder = folder
        self.tokenizer = tokenizer
        self.token_type = smallest_token_type(tokenizer.vocab_size)
        self.text_bytes = 0
        self._partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)  # of an interrupted run
        self._partial.mkdir(parents=True)
        self._files = ExitStack()
        try:
            self._shards = [self._open(index) for index in range(num_shards)]
        except OSError as error:
            self._discard()
            raise UserError(f"cannot open {num_shards} shards in {self._partial}: {error.strerror}") from None
        self._lightest = [(0, index) for index in range(num_shards)]

    def _open(self, index: int) -> _OpenShard:
        path = self._partial / f"shard-{index:05d}.tar"
        file = self._files.enter_context(path.open("wb"))
        # PAX: USTAR ends a name at 100 bytes. The time is fixed so that equal data sets are equal files.
        tar = self._files.enter_context(TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT"))
        return _OpenShard(path, file, tar)

    def write(
        self, document_id: str, tokens: Sequence[int] | NDArray[np.unsignedinteger[Any]], text_bytes: int
    ) -> None:
        """Add a document.

        Args:
            tokens: its token ids, the last one the end-of-sequence token.
            text_bytes: length of its text as UTF-8.
        """
        data = np.asarray(tokens, dtype=on_disk(self.token_type))
        _, index = self._lightest[0]
        shard = self._shards[index]
        key = quote(document_id, safe="", errors="surrogateescape").replace(".", "%2E")
        shard.tar.write({"__key__": key, MEMBER: data.tobytes()})
        shard.documents += 1
        shard.tokens += len(data)
        self.text_bytes += text_bytes
        heapq.heapreplace(self._lightest, (shard.tokens, index))

    def finish(self, *, corpus_sha256: str, validation_share: float) -> None:
        """Close the shards and write the manifest; `publish` is then all that is left.

        Raises:
            UserError: fewer documents than shards.
        """
        documents = sum(shard.documents for shard in self._shards)
        if documents < len(self._shards):
            raise UserError(
                f"{self.folder} would have {documents} documents for {len(self._shards)} shards; ask for fewer shards "
                f"or give it more documents"
            )
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            token_type=self.token_type,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            tokenizer_sha256=self.tokenizer.sha256,
            corpus_sha256=corpus_sha256,
            validation_share=validation_share,
            text_bytes=self.text_bytes,
            documents=documents,
            tokens=sum(shard.tokens for shard in self._shards),
            shards=tuple(shard.close() for shard in self._shards),
        )
        (self._partial / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def publish(self) -> None:
        """Give the finished data set its name."""
        self._partial.rename(self.folder)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        """Remove what was not published; a published data set has left the partial folder."""
        try:
            self._files.close()  # ends the tar files, which a full disk refuses once more
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
