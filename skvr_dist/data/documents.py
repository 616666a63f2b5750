"""File formats of a corpus: the documents in a file, or in a part of one.

Files of records (`.jsonl`, compressed or not, and `.parquet`) hold many documents and can be shared among processes;
any other file is one document.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from skvr_dist.errors import UserError

COMPRESSED_SUFFIXES = (".jsonl.gz", ".jsonl.zst")
RECORD_SUFFIXES = (".jsonl", *COMPRESSED_SUFFIXES, ".parquet")

Advance = Callable[[int], object]
"""Called with bytes of the file that have been dealt with."""

# Multiplied by a line's number, modulo 2**32, it spreads the lines evenly over any range: the golden ratio (Knuth,
# The Art of Computer Programming 3, section 6.4).
_SPREAD = 0x9E3779B9
_PARQUET_ROWS = 256  # decoded at a time


class Document(NamedTuple):
    """A text and its name, unique and stable within its corpus.

    The name is the relative path of the file; for a record also `:` and where it begins, in bytes of the
    (decompressed) jsonl file or in rows.
    """

    id: str
    text: str


class LeftOut(NamedTuple):
    """A document that cannot be used."""

    place: str
    reason: str
    """What is wrong with it, the same words for all that have the same fault; `EMPTY` is none."""


EMPTY = "is empty"
INVALID_UTF8 = "is not valid UTF-8"


class FilePart(NamedTuple):
    """Bytes `start` to `stop` of a file of `size` bytes; a file of records may be read in several parts."""

    name: str
    """Path relative to the corpus."""
    path: Path
    size: int
    start: int
    stop: int

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.size


def holds_records(name: str) -> bool:
    return name.endswith(RECORD_SUFFIXES)


def read_part(part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    """The documents of a part, each in exactly one of the parts that make up its file.

    Plain jsonl is cut between lines, parquet between rows. A compressed file can only be read from its beginning:
    each part reads all of it and takes its share of the lines.

    Raises:
        UserError: the file cannot be read or is not in its format.
    """
    with _reading(part.path):
        if part.name.endswith(".parquet"):
            yield from _read_parquet(part, text_key, advance)
        elif part.name.endswith(COMPRESSED_SUFFIXES):
            yield from _read_compressed(part, text_key, advance)
        elif holds_records(part.name):
            yield from _read_jsonl(part, text_key, advance)
        else:
            yield _decode(part.path.read_bytes(), part.name, str(part.path))
            advance(part.size)


def _read_jsonl(part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    """The lines that begin in the part."""
    with part.path.open("rb") as file:
        position = part.start
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # the rest of a line that began before, or one line feed
        while position < part.stop and (line := file.readline()):
            if line.strip():
                yield _parse_line(line, part, position, text_key)
            position += len(line)
            advance(len(line))


def _read_compressed(part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    position, reported = 0, 0
    with part.path.open("rb") as raw, _decompress(raw, part.name) as file:
        for number, line in enumerate(file):
            if part.start <= (number * _SPREAD % 2**32) * part.size >> 32 < part.stop and line.strip():
                yield _parse_line(line, part, position, text_key)
            position += len(line)
            done = raw.tell() * (part.stop - part.start) // part.size
            advance(done - reported)
            reported = done


def _decompress(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


def _parse_line(line: bytes, part: FilePart, position: int, text_key: str) -> Document | LeftOut:
    place = f"{part.path}, the line at byte {position}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return LeftOut(f"{part.path} at byte {position + error.start}", INVALID_UTF8)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON at its character {error.pos + 1}: {error.msg}") from None
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{place} has no text under the key {text_key!r}; name the right one with --text-key")
    return _document(text, f"{part.name}:{position}", place)


def _read_parquet(part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    file = pyarrow.parquet.ParquetFile(part.path)
    schema, rows = file.schema_arrow, file.metadata.num_rows
    if text_key not in schema.names:
        columns = ", ".join(schema.names)
        raise UserError(f"{part.path} has no column {text_key!r}, only {columns}; name the right one with --text-key")
    if schema.field(text_key).type not in (pyarrow.string(), pyarrow.large_string()):
        raise UserError(f"column {text_key!r} of {part.path} holds {schema.field(text_key).type}, not text")
    first, last = rows * part.start // part.size, rows * part.stop // part.size
    group_start = 0
    for group in range(file.num_row_groups):
        group_rows = file.metadata.row_group(group).num_rows
        if group_start < last and group_start + group_rows > first:
            row = group_start
            # Binary, because arrow does not look whether its strings are valid.
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    if first <= row < last:
                        yield _decode(value.as_py() or b"", f"{part.name}:{row}", f"{part.path}, row {row}")
                    row += 1
        group_start += group_rows
    advance(part.stop - part.start)


def _decode(data: bytes, name: str, place: str) -> Document | LeftOut:
    try:
        return _document(data.decode(), name, place)
    except UnicodeDecodeError as error:
        return LeftOut(f"{place} at byte {error.start}", INVALID_UTF8)


def _document(text: str, name: str, place: str) -> Document | LeftOut:
    if not text:
        return LeftOut(place, EMPTY)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no UTF-8 text can hold
        return LeftOut(place, "holds half of a surrogate pair")
    return Document(name, text)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
