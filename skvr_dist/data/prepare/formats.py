"""File formats of a corpus: the documents in a file, or in a part of one.

Files of records (`.jsonl` and `.parquet`) hold many documents and can be shared among processes; any other file is one
document. Each may be compressed, with one more suffix.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from skvr_dist.errors import UserError
from skvr_dist.files import require_file

RECORD_SUFFIXES = (".jsonl", ".parquet")


def _decompress_zstd(raw: BinaryIO) -> BinaryIO:
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


# The keys end the names of compressed files, after the suffix of what is in them.
_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _decompress_zstd,
}
COMPRESSIONS = tuple(_DECOMPRESS)

Advance = Callable[[int], object]
"""Called with the number of bytes that were processed since the last call."""

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
    """What is wrong with it, in the same words for the same fault; `EMPTY` is not a fault."""
    detail: str = ""
    """Details about this document, which follow the reason in a sentence."""
    remedy: str = "convert it"

    @property
    def sentence(self) -> str:
        """The fault in a sentence, with its place."""
        return f"{self.place} {self.reason}{self.detail}"


EMPTY = "is empty"
INVALID_UTF8 = "is not valid UTF-8"
HALF_A_PAIR = "holds half of a surrogate pair"


class FilePart(NamedTuple):
    """Bytes `start` to `stop` of a file of `size` bytes; a file of records may be read in several parts."""

    name: str
    """Path relative to the corpus."""
    path: Path
    size: int
    start: int
    stop: int


def holds_records(name: str) -> bool:
    """Whether a file of that name holds many documents."""
    return _format(name)[0] in RECORD_SUFFIXES


def _format(name: str) -> tuple[str, str]:
    """(one of `RECORD_SUFFIXES`, one of `COMPRESSIONS`), each or nothing, whatever the case."""
    name = name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    content = name.removesuffix(compression)
    return next((suffix for suffix in RECORD_SUFFIXES if content.endswith(suffix)), ""), compression


def read_part(part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    """The documents of a part, each in exactly one of the parts that make up its file.

    Plain jsonl is cut between lines, parquet between rows. A compressed file can only be read from its beginning:
    each part reads all of it and takes its share of the lines.

    Raises:
        UserError: the file cannot be read or is not in its format.
    """
    content, compression = _format(part.name)
    if not part.size:
        if not holds_records(part.name):
            yield LeftOut(str(part.path), EMPTY)
        return
    with reading(part.path):
        require_file(part.path)
        with part.path.open("rb") as raw:
            file = _DECOMPRESS[compression](raw) if compression else raw
            if content == ".parquet":
                yield from _read_parquet(file if file is raw else io.BytesIO(file.read()), part, text_key)
                advance(part.stop - part.start)
            elif content == ".jsonl" and compression:
                yield from _read_compressed(raw, file, part, text_key, advance)
            elif content == ".jsonl":
                yield from _read_jsonl(raw, part, text_key, advance)
            else:
                yield _decode(file.read(), part.name, str(part.path), at_start=True)
                advance(part.size)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed if its name says so, without a byte-order mark at its beginning.

    It is read once, so it may be a pipe.

    Raises:
        UserError: the file cannot be read.
    """
    compression = _format(path.name)[1]
    with reading(path):
        require_file(path, or_pipe=True)
        with path.open("rb") as raw:
            for number, line in enumerate(_DECOMPRESS[compression](raw) if compression else raw):
                yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _read_jsonl(file: BinaryIO, part: FilePart, text_key: str, advance: Advance) -> Iterator[Document | LeftOut]:
    """The lines that begin in the part."""
    position = part.start
    if position:
        file.seek(position - 1)
        position += len(file.readline()) - 1  # the rest of a line that began before, or one line feed
    while position < part.stop and (line := file.readline()):
        yield from _read_line(line, part, position, text_key)
        position += len(line)
        advance(len(line))


def _read_compressed(
    raw: BinaryIO, file: BinaryIO, part: FilePart, text_key: str, advance: Advance
) -> Iterator[Document | LeftOut]:
    position, reported = 0, 0
    for number, line in enumerate(file):
        if part.start <= (number * _SPREAD % 2**32) * part.size >> 32 < part.stop:
            yield from _read_line(line, part, position, text_key)
        position += len(line)
        done = raw.tell() * (part.stop - part.start) // part.size
        advance(done - reported)
        reported = done


def _read_line(line: bytes, part: FilePart, position: int, text_key: str) -> Iterator[Document | LeftOut]:
    """The document of a line, or none if it is blank."""
    skipped = len(codecs.BOM_UTF8) if position == 0 and line.startswith(codecs.BOM_UTF8) else 0
    if not line[skipped:].strip():
        return
    place = f"{part.path}, the line at byte {position}"
    try:
        record = parse_json(line[skipped:])
    except UnicodeDecodeError as error:
        yield LeftOut(f"{part.path} at byte {position + skipped + error.start}", INVALID_UTF8)
    except json.JSONDecodeError as error:
        yield LeftOut(place, "is not JSON", f" at its character {error.pos + 1}: {error.msg}", "mend it")
    except NestingError as error:
        yield LeftOut(place, str(error), remedy="mend it")
    else:
        yield _text_of(record, text_key, f"{part.name}:{position}", place)


def _text_of(record: Any, text_key: str, name: str, place: str) -> Document | LeftOut:
    if not isinstance(record, dict) or not isinstance(text := record.get(text_key, 0), str | None):
        return LeftOut(place, f"has no text under the key {text_key!r}", remedy="name the right one with --text-key")
    if isinstance(record, _RepeatingDict) and text_key in record.repeated:
        return LeftOut(place, f"has more than one text under the key {text_key!r}", remedy="mend it")
    return _document(text or "", name, place)


class NestingError(ValueError):
    """JSON with more levels than can be read."""


class _RepeatingDict(dict[str, Any]):
    """A JSON object that gives some of its keys more than once; each has its last value."""

    repeated: frozenset[str]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = _RepeatingDict(found)
        found.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return found


# Numbers are of no interest, and Python makes no int of more than 4,300 digits.
_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=_object)


def parse_json(line: bytes) -> Any:
    """The JSON value in a line; all numbers in it are floats.

    Raises:
        ValueError: a `UnicodeDecodeError`, a `json.JSONDecodeError` or a `NestingError`.
    """
    try:
        return _DECODER.decode(line.decode())
    except RecursionError:
        raise NestingError("is nested too deeply") from None


def _read_parquet(source: BinaryIO, part: FilePart, text_key: str) -> Iterator[Document | LeftOut]:
    file = pyarrow.parquet.ParquetFile(source)
    schema, rows = file.schema_arrow, file.metadata.num_rows
    named = schema.names.count(text_key)
    if named != 1:
        columns = ", ".join(schema.names)
        found = f"has {named} columns {text_key!r}" if named else f"has no column {text_key!r}, only {columns}"
        raise UserError(f"{part.path} {found}; name the right one with --text-key")
    if not _holds_texts(schema.field(text_key).type):
        raise UserError(
            f"column {text_key!r} of {part.path} holds {schema.field(text_key).type}, not text; name the right one "
            f"with --text-key"
        )
    first, last = rows * part.start // part.size, rows * part.stop // part.size
    group_start = 0
    for group in range(file.num_row_groups):
        group_rows = file.metadata.row_group(group).num_rows
        if group_start < last and group_start + group_rows > first:
            row = group_start
            # Binary, because arrow does not look whether its strings are valid.
            for batch in file.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[text_key]):
                for value in batch.column(text_key).cast(pyarrow.large_binary()):
                    if first <= row < last:
                        yield _decode(value.as_py() or b"", f"{part.name}:{row}", f"{part.path}, row {row}")
                    row += 1
        group_start += group_rows


def _holds_texts(kind: Any) -> bool:
    """Whether arrow turns values of a type into the bytes of texts: strings in all their forms, and bytes."""
    types = pyarrow.types
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{test}")(kind) for test in (*tests, "null"))


def _decode(data: bytes, name: str, place: str, *, at_start: bool = False) -> Document | LeftOut:
    """A document from its bytes; a byte-order mark is no part of it `at_start` of a file."""
    skipped = len(codecs.BOM_UTF8) if at_start and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return _document(data[skipped:].decode(), name, place)
    except UnicodeDecodeError as error:
        return LeftOut(f"{place} at byte {skipped + error.start}", INVALID_UTF8)


def _document(text: str, name: str, place: str) -> Document | LeftOut:
    if not text:
        return LeftOut(place, EMPTY)
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no UTF-8 text can hold
        return LeftOut(place, HALF_A_PAIR)
    return Document(name, text)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure to read or decompress a file into a `UserError` that names the file and the reason."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, MemoryError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from None
