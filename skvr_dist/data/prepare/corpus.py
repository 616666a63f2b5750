"""Corpora: the files that a tokenizer is trained on and a data set is made from.

A corpus is a file or a folder. Its order is that of the sorted folder tree, the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn, get_args

from tqdm import tqdm

from skvr_dist.data.format import MANIFEST
from skvr_dist.data.prepare.formats import (
    COMPRESSIONS,
    EMPTY,
    RECORD_SUFFIXES,
    Advance,
    Document,
    FilePart,
    LeftOut,
    read_part,
    reading,
)
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, require_file

__all__ = ["LEFT_OUT_FILE", "Corpus", "Document", "add_corpus_arguments", "corpus_from", "hash_fraction", "open_corpus"]

InvalidText = Literal["stop", "skip"]

_PLAIN_SUFFIXES = (".txt", ".md", ".py", *RECORD_SUFFIXES)
# Parquet compresses its own columns.
DEFAULT_SUFFIXES = _PLAIN_SUFFIXES + tuple(
    plain + compression for plain in _PLAIN_SUFFIXES if plain != ".parquet" for compression in COMPRESSIONS
)
_DEFAULT_SHOWN = f"{', '.join(_PLAIN_SUFFIXES)}, compressed ({', '.join(COMPRESSIONS)}) or not"

LEFT_OUT_FILE = "left-out.txt"
"""File beside data sets that names the documents of their corpus which are in none of them."""
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


class Corpus:
    """The documents under a path, iterated in a fixed order, without those that cannot be used.

    `left_out` counts, by reason, the documents that the last iteration left out.

    Args:
        root: a file, or a folder that is searched at any depth. Symbolic links to folders are not followed, hidden
            entries are not read.
        suffixes: files to read when `root` is a folder, in capitals or not.
        exclude: shell patterns of names or relative paths that are not read.
        text_key: key of a jsonl line, or column of a parquet file, that holds the text.
        invalid_text: what to do about a document that is not valid Unicode, or a line that is no JSON object with a
            text: `stop`, or `skip` and count it. Empty documents are left out and counted either way.

    Raises:
        UserError: neither a file nor a folder at `root`; and while iterating: a file cannot be read, a document is
            invalid, or there is no document at all.
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
        self.root = local_path(root)
        self.suffixes = tuple(suffixes)
        self._lower_suffixes = tuple(suffix.lower() for suffix in suffixes)
        self.exclude = tuple(exclude)
        self.text_key = text_key
        self.invalid_text = invalid_text
        self.left_out: Counter[str] = Counter()
        with reading(self.root):
            if not os.path.lexists(self.root):
                raise UserError(f"input {self.root} does not exist; give a file, a folder or the name {STDLIB}")
            if not self.root.is_dir():
                require_file(self.root)

    def __iter__(self) -> Iterator[Document]:
        return self.documents(self.files())

    def documents(self, files: Sequence[FilePart]) -> Iterator[Document]:
        """The documents of some of its files.

        Raises:
            UserError: a file cannot be read, a document is invalid, or there is no document at all.
        """
        self.left_out.clear()
        empty = True
        with progress_bar(files) as bar:
            for part in files:
                for item in self.read(part, bar.update):
                    if isinstance(item, Document):
                        empty = False
                        yield item
                    else:
                        self.left_out[item.reason] += 1
        if empty:
            reasons = ", ".join(f"{count} because each {reason}" for reason, count in self.left_out.items())
            raise UserError(
                f"input {self.root} holds no text: {self.left_out.total()} documents were left out"
                f"{', ' if reasons else ''}{reasons}; give one that holds texts"
            )

    def files(self) -> list[FilePart]:
        """The files to read, whole, sorted by name.

        Raises:
            UserError: there is none, or a folder cannot be read.
        """
        found = [FilePart(name, path, size, 0, size) for name, path, size in self._files()]
        if not any(part.size for part in found):
            shown = _DEFAULT_SHOWN if self.suffixes == DEFAULT_SUFFIXES else ", ".join(self.suffixes)
            raise UserError(f"input {self.root} holds no text; read were files that end in {shown}")
        return found

    def read(self, part: FilePart, advance: Advance) -> Iterator[Document | LeftOut]:
        """The documents of a part of a file, as `read_part` gives them; an invalid one stops unless it may be skipped.

        Raises:
            UserError: the file cannot be read, or a document is invalid.
        """
        for item in read_part(part, self.text_key, advance):
            if isinstance(item, LeftOut) and item.reason != EMPTY and self.invalid_text == "stop":
                raise UserError(f"{item.sentence}; {item.remedy}, or leave such documents out with --invalid-text skip")
            yield item

    def _files(self) -> Iterator[tuple[str, Path, int]]:
        """(relative name, path, size) of the files to read."""
        if not self.root.is_dir():
            yield self.root.name, self.root, _size(self.root)
            return
        for folder, subfolders, files in os.walk(self.root, onerror=_refuse_folder):
            relative = PurePosixPath(Path(folder).relative_to(self.root))
            subfolders[:] = sorted(name for name in subfolders if self._wanted(relative / name))
            for name in sorted(files):
                if name == LEFT_OUT_FILE and any(Path(folder).glob(f"*/{MANIFEST}")):
                    continue  # a preparation wrote it beside its data sets
                if name.lower().endswith(self._lower_suffixes) and self._wanted(relative / name):
                    yield str(relative / name), Path(folder, name), _size(Path(folder, name))

    def _wanted(self, path: PurePosixPath) -> bool:
        if path.name.startswith("."):
            return False
        return not any(fnmatchcase(path.name, p) or fnmatchcase(str(path), p) for p in self.exclude)


def progress_bar(parts: Iterable[FilePart]) -> tqdm[NoReturn]:
    """A bar over the bytes of files, with rate and time left."""
    total = sum(part.stop - part.start for part in parts)
    return tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None)


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
        help=f"files to read in a folder (default: {_DEFAULT_SHOWN})",
    )
    group.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="names or relative paths in a folder not to read"
    )
    group.add_argument("--text-key", default="text", metavar="KEY", help="key or column of the text")
    group.add_argument(
        "--invalid-text",
        choices=get_args(InvalidText),
        help="what to do about documents that are not valid UTF-8 and lines that are not JSON or have no text",
    )


def corpus_from(arguments: Namespace) -> Corpus:
    """The corpus that a command line with `--input` and `add_corpus_arguments` names; raises as `Corpus` does."""
    return open_corpus(
        arguments.input,
        suffixes=arguments.suffixes,
        exclude=arguments.exclude,
        text_key=arguments.text_key,
        invalid_text=arguments.invalid_text,
    )


def hash_fraction(key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on these two alone, independent between purposes."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def _size(path: Path) -> int:
    with reading(path):
        return require_file(path).st_size


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
