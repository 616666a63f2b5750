"""Files that commands are given and files that they write.

A command has every place that it will write to proven with `prove_writable` or `prove_folder` before its work begins,
and writes each file with `write_whole`: beside its name, then renamed, so that a file is whole or not there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from skvr_dist.errors import UserError

MANIFEST_FILE = "manifest.json"
"""What lists the files of a checkpoint or a data set, which are damaged if one of them is another."""
PARTIAL_SUFFIX = ".partial"
"""Suffix of the names of files and folders that are not complete yet."""

# A single slash too: `Path` makes one of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")
_READ_BYTES = 1 << 22
_PROBE_BYTES = 4096  # a full disk may still take an empty file
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def local_path(text: str | Path) -> Path:
    """The path that a text names, `~` replaced by the home folder.

    Raises:
        UserError: it is empty or a URL, or there is no such user.
    """
    name = str(text)
    if not name or "\0" in name or any("\ud800" <= letter <= "\udc7f" for letter in name):
        raise UserError(f"{name!r} is no path; give the name of a file or a folder")
    if _URL.match(name):
        raise UserError(f"{name} is a URL, but only paths of this machine are read and written here; mount or copy it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{name} begins with the name of no user of this machine; write the path out") from None


def require_file(path: Path, *, or_pipe: bool = False) -> os.stat_result:
    """Status of a file that is to be read, possibly several times (`os.stat`).

    Args:
        or_pipe: it is read once, so that a pipe will do.

    Raises:
        OSError: it cannot be reached.
        UserError: it is no regular file: to read a pipe or a device might never end.
    """
    facts = path.stat()
    if not (stat.S_ISREG(facts.st_mode) or (or_pipe and stat.S_ISFIFO(facts.st_mode))):
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "no regular file")
        raise UserError(f"cannot read {path}: it is {kind}, not a regular file; copy it to one or leave it out")
    return facts


def sha256_of(file: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; a block of it is in memory at a time."""
    digest = hashlib.sha256()
    with Path(file).open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def as_json(record: Any, indent: int | None = None) -> str:
    """JSON that every reader takes (RFC 8259): what is not a finite number becomes null.

    Args:
        record: made of dictionaries, sequences, dataclasses and scalars.
    """
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8.

    A symbolic link keeps pointing where it did. A device or a pipe (`/dev/stdout`) is written to.

    Raises:
        UserError: it cannot be written; what was there before still is.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with naming_failure(path):
        if is_stream(path):
            path.write_bytes(data)
            return
        path = Path(os.path.realpath(path))
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made if it is not there; all of it is with the system when this returns.

    Raises:
        UserError: it cannot be written; the file may end with a part of the line.
    """
    data = f"{line}\n".encode()
    with naming_failure(path), path.open("ab", buffering=0) as file:  # a buffer would meet a full disk when it is freed
        if file.write(data) != len(data):
            raise OSError(None, os.strerror(errno.ENOSPC))


def prove_writable(file: str | Path, *, make_folder: bool = False) -> Path:
    """The path of a file (see `local_path`) that `write_whole` can write; everything is left as it was.

    Args:
        make_folder: the folder will be made when the time comes; else it must be there.

    Raises:
        UserError: it could not be written.
    """
    if str(file) == "-":
        raise UserError("cannot write -: it would be a file of that name; for the standard output give /dev/stdout")
    named = local_path(file)
    with naming_failure(named):
        if is_stream(named):
            return named
        path = Path(os.path.realpath(named))
        if path.is_dir():
            raise OSError(None, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise OSError(None, "it is write-protected")
        if path.exists() and _is_listed(path):
            raise UserError(f"{named} is part of what {path.with_name(MANIFEST_FILE)} lists; write to another file")
        _probe(path.parent, path.name + PARTIAL_SUFFIX, make_folder)
    return named


def _is_listed(path: Path) -> bool:
    """Whether a file belongs to the manifest beside it; an index of a shard goes with the shard's name."""
    manifest = path.with_name(MANIFEST_FILE)
    listed = manifest.read_bytes() if manifest.is_file() else b""
    if b'sha256"' not in listed:  # some other program's
        return False
    return path.stem == manifest.stem or f'"{path.stem}.'.encode() in listed


def prove_folder(folder: str | Path) -> Path:
    """The path of a folder (see `local_path`) that is there, or can be made with those it lies in, and takes files.

    Everything is left as it was.

    Raises:
        UserError: it could not.
    """
    path = local_path(folder)
    with naming_failure(path):
        _probe(path, f"probe-{os.getpid()}{PARTIAL_SUFFIX}", True)
    return path


def prove_new_folder(folder: str | Path) -> Path:
    """The path of a folder (see `local_path`) that `published` can make, for which it must be empty or not there.

    Everything is left as it was.

    Raises:
        UserError: something is there, which would be lost or mixed with what is written; or it cannot be written.
    """
    named = local_path(folder)
    path = Path(os.path.realpath(named))  # a folder can be replaced, a link to one cannot
    with naming_failure(named):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"output {path} exists and is not an empty folder; choose another one, or remove it first")
        if path.is_mount():
            raise UserError(f"output {path} is a mount point, which cannot be replaced by a folder; give one below it")
        _probe(path.parent, path.name, True)
    return path


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield an empty folder of the same name; it becomes `folder` at the end, and is removed if anything is raised.

    It is in a temporary folder beside `folder`, so that the rename stays within one file system. Files get the rights
    that this process gives to files; safetensors, for one, writes them for its user alone.

    Raises:
        UserError: it cannot be written, at the beginning or after the disk has filled up.
    """
    folder = Path(os.path.realpath(local_path(folder)))
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        with naming_failure(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f"{folder.name[:64]}{PARTIAL_SUFFIX}-", dir=folder.parent)
        with temporary, naming_full_disk(folder):
            filled = Path(temporary.name) / folder.name
            filled.mkdir()
            yield filled
            with naming_failure(folder):
                for file in filled.rglob("*"):
                    if file.is_file():
                        file.chmod(0o666 & ~_umask())
                filled.replace(folder)
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # not made, or somebody else has put something there
                parent.rmdir()
        raise


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn the errors in which packages report a full disk within into a `UserError` that names what was written."""
    try:
        yield
    except Exception as error:
        if reason := full_disk(error):
            raise UserError(f"cannot write {path}: {reason}; make room, or choose another disk") from None
        raise


def full_disk(error: BaseException) -> str | None:
    """What the system says of a disk that takes no more, if an error is about that; packages hide it in text."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if getattr(error, "errno", None) == number or os.strerror(number).lower() in str(error).lower():
            return os.strerror(number)
    return None


def _umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)  # there is no way to ask without setting it
    os.umask(mask)
    return mask


def _probe(folder: Path, name: str, make_folder: bool) -> None:
    """Write a block to a file that is not there yet, and remove all that this made."""
    made: list[Path] = []
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise OSError(None, f"{there} is not a folder")
    try:
        if make_folder:
            missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
            for parent in reversed(missing):
                parent.mkdir()
                made.append(parent)
        probe = folder / name
        if os.path.lexists(probe):  # left behind by a command that was killed; it will be replaced
            probe = folder / f"probe-{os.getpid()}{PARTIAL_SUFFIX}"
        try:
            with probe.open("xb", buffering=0) as file:
                if file.write(bytes(_PROBE_BYTES)) != _PROBE_BYTES:
                    raise OSError(None, os.strerror(errno.ENOSPC))
        finally:
            probe.unlink(missing_ok=True)
    finally:
        for parent in reversed(made):
            with suppress(OSError):  # somebody else has put something there
                parent.rmdir()


def is_stream(path: Path) -> bool:
    """Whether a path is to be written in place: renaming a file over a device or a pipe would replace it."""
    in_place = path.absolute().parent in (Path("/dev"), Path("/dev/fd"))  # /dev/stdout may be a file, and open
    return path.exists() and (in_place or not (path.is_file() or path.is_dir()))


@contextmanager
def naming_failure(path: Path) -> Iterator[None]:
    """Turn an OSError within into a `UserError` that says what could not be written and why."""
    try:
        yield
    except OSError as error:
        # A name that is too long or in the way may be that of a folder above, or of the file beside.
        culprit = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise UserError(f"cannot write {path}: {error.strerror or error}{culprit}") from None
