"""Documents: the texts that a tokenizer is trained on and a data set is made from.

A corpus is a file or a folder. `.jsonl` and `.jsonl.gz` files hold a document per line; any other file is one
document. The order is that of the sorted folder tree, the same on every machine.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

from skvr_dist.errors import UserError

InvalidText = Literal["stop", "skip"]

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
DEFAULT_SUFFIXES = (".txt", ".md", ".py", *JSONL_SUFFIXES)

STDLIB = "stdlib"
"""Input name of the running Python's own standard library."""
INPUT_HELP = f"a file, a folder, or {STDLIB}: the running Python's own standard library"
# What is installed beside the library, its tests, and tables written by programs: not code that a person wrote to
# be read. Some of the tests are not UTF-8 on purpose.
STDLIB_EXCLUDE = (
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "msilib",
    "_sysconfigdata_*",
    "config-*",
    "html/entities.py",
    "stringprep.py",
)


class Document(NamedTuple):
    """A text and its name, unique and stable within its corpus: the relative path, with `:line` for a jsonl file."""

    id: str
    text: str


class Corpus:
    """The documents under a path, iterated in a fixed order; empty ones are left out.

    `skipped` counts the invalid documents that the last iteration left out (`invalid_text="skip"`).

    Args:
        root: a file, or a folder that is searched at any depth. Symbolic links to folders are not followed, hidden
            entries are not read.
        suffixes: files to read when `root` is a folder.
        exclude: shell patterns of names or relative paths that are not read.
        text_key: key of a jsonl line that holds the text.
        invalid_text: what to do about a document that is not valid Unicode: `stop`, or `skip` and count it.

    Raises:
        UserError: nothing at `root`; and while iterating: a file cannot be read, a document is invalid, or there is
            no document at all.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        suffixes: Sequence[str] = DEFAULT_SUFFIXES,
        exclude: Sequence[str] = (),
        text_key: str = "text",
        invalid_text: InvalidText = "stop",
    ) -> None:
        self.root = Path(root)
        self.suffixes = tuple(suffixes)
        self.exclude = tuple(exclude)
        self.text_key = text_key
        self.invalid_text = invalid_text
        self.skipped = 0
        if not self.root.exists():
            raise UserError(f"input {self.root} does not exist; give a file, a folder or the name {STDLIB}")

    def __iter__(self) -> Iterator[Document]:
        self.skipped = 0
        empty = True
        for name, path in self._files():
            read = self._read_lines if path.name.endswith(JSONL_SUFFIXES) else self._read_whole
            for document in read(name, path):
                if document.text:
                    empty = False
                    yield document
        if empty:
            skipped = f" ({self.skipped} invalid ones were skipped)" if self.skipped else ""
            raise UserError(f"input {self.root} holds no text{skipped}; read were {', '.join(self.suffixes)} files")

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(relative name, path) of the files to read."""
        if self.root.is_file():
            yield self.root.name, self.root
            return
        for folder, subfolders, files in os.walk(self.root, onerror=_refuse_folder):
            relative = PurePosixPath(Path(folder).relative_to(self.root))
            subfolders[:] = sorted(name for name in subfolders if self._wanted(relative / name))
            for name in sorted(files):
                if name.endswith(self.suffixes) and self._wanted(relative / name):
                    yield str(relative / name), Path(folder, name)

    def _wanted(self, path: PurePosixPath) -> bool:
        if path.name.startswith("."):
            return False
        return not any(fnmatchcase(path.name, p) or fnmatchcase(str(path), p) for p in self.exclude)

    def _read_whole(self, name: str, path: Path) -> Iterator[Document]:
        with _reading(path):
            data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            self._refuse(f"{path} is not valid UTF-8 at byte {error.start}")
            return
        yield Document(name, text)

    def _read_lines(self, name: str, path: Path) -> Iterator[Document]:
        offset = 0
        with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    text = self._parse_line(line, f"{path}, line {number}", offset)
                    if text is not None:
                        yield Document(f"{name}:{number}", text)
                offset += len(line)

    def _parse_line(self, line: bytes, place: str, offset: int) -> str | None:
        """The text of a jsonl line that starts at byte `offset`; None if it is to be skipped."""
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            self._refuse(f"{place} is not valid UTF-8 at byte {offset + error.start} of the file")
            return None
        except json.JSONDecodeError as error:
            raise UserError(f"{place} is not JSON at its character {error.pos + 1}: {error.msg}") from None
        text = record.get(self.text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{place} has no text under the key {self.text_key!r}; name the right one with --text-key")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no UTF-8 text can hold
            self._refuse(f"{place} holds half of a surrogate pair, which is not valid Unicode")
            return None
        return text

    def _refuse(self, problem: str) -> None:
        if self.invalid_text == "stop":
            raise UserError(f"{problem}; convert it, or leave such documents out with --invalid-text skip")
        self.skipped += 1


def open_corpus(
    name: str,
    *,
    suffixes: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    text_key: str = "text",
    invalid_text: InvalidText | None = None,
) -> Corpus:
    """The corpus at a path, or for the name `stdlib` the source of the running Python's standard library.

    None takes what is usual: for `stdlib` its .py files, less the few that are invalid on purpose; else
    `DEFAULT_SUFFIXES` and `stop`.
    """
    if name == STDLIB:
        return Corpus(
            sysconfig.get_path("stdlib"),
            suffixes=suffixes or (".py",),
            exclude=(*STDLIB_EXCLUDE, *exclude),
            text_key=text_key,
            invalid_text=invalid_text or "skip",
        )
    return Corpus(
        name,
        suffixes=suffixes or DEFAULT_SUFFIXES,
        exclude=exclude,
        text_key=text_key,
        invalid_text=invalid_text or "stop",
    )


def add_corpus_arguments(parser: ArgumentParser) -> None:
    """The options of a command line for its `--input`; `corpus_from` reads them."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--suffixes",
        nargs="+",
        metavar="SUFFIX",
        help=f"files to read in a folder (default: {' '.join(DEFAULT_SUFFIXES)})",
    )
    group.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names or relative paths in a folder not to read"
    )
    group.add_argument("--text-key", default="text", metavar="KEY", help="key of a jsonl line that holds the text")
    group.add_argument("--invalid-text", choices=get_args(InvalidText), help="documents that are not valid UTF-8")


def corpus_from(arguments: Namespace) -> Corpus:
    return open_corpus(
        arguments.input,
        suffixes=arguments.suffixes,
        exclude=arguments.exclude,
        text_key=arguments.text_key,
        invalid_text=arguments.invalid_text,
    )


def document_fraction(document_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the document's id alone, independent between purposes."""
    digest = hashlib.sha256(f"{purpose}\0{document_id}".encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
