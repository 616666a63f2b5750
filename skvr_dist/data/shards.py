"""Reading data sets: any chunk of documents of any shard, compared with its checksum before it is used.

A local shard is read chunk by chunk, found by its index. One behind a URL or a pipe comes as a stream, so it is
fetched whole and kept in memory while it is open. `skvr_dist.data.format` tells what is on disk.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes

from skvr_dist.data.format import (
    LENGTH_TYPE,
    MANIFEST,
    RESTORE,
    TOKENIZER_FILE,
    Manifest,
    Shard,
    ShardIndex,
    on_disk,
    parse_manifest,
    parse_stored,
)
from skvr_dist.data.tokenizers.base import Tokenizer, mean_the_same
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, require_file, sha256_of

TRAIN, VALIDATION = "train", "validation"


class DamageError(UserError):
    """A shard, or a part of one, is not what its manifest says; the message names shard, byte and reason."""


class ChunkTokens(NamedTuple):
    """The content of one chunk, in stored order."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Token ids of all documents [tokens of the chunk]."""
    offsets: NDArray[np.int64]
    """Document i is tokens[offsets[i] : offsets[i + 1]]; [documents + 1]."""


@dataclass(frozen=True)
class Dataset:
    """A complete data set; `open` it."""

    location: str
    """A folder; a URL that webdataset can open; or a `pipe:` command in which `{file}` stands for the file's name."""
    manifest: Manifest

    @classmethod
    def open(cls, location: str | Path, *, check_sizes: bool = True) -> Dataset:
        """Read the manifest and see that the shards of a folder are there in full size (`check_sizes`).

        Raises:
            UserError: no (complete) data set there, an unreadable manifest, or a shard that is missing or of another
                size.
        """
        location = _checked(str(location))
        dataset = cls(location, read_manifest(location))
        if check_sizes and not _is_remote(location):
            for shard in dataset.manifest.shards:
                for file, expected in ((shard.file, shard.bytes), (shard.index_file, None)):
                    path = Path(location, file)
                    size = path.stat().st_size if path.exists() else None
                    if size is None or expected not in (None, size):
                        found = "is missing" if size is None else f"has {size} bytes"
                        named = "names it" if expected is None else f"names {expected} bytes"
                        raise DamageError(f"shard file {path} {found}, but the manifest {named}; {RESTORE}")
        return dataset

    @property
    def fingerprint(self) -> str:
        """Equal for two data sets with the same shards."""
        shards = json.dumps([shard.sha256 for shard in self.manifest.shards])
        return hashlib.sha256(shards.encode()).hexdigest()[:16]

    def require_vocabulary(self, vocab_size: int) -> None:
        """Refuse a model with too few embeddings for the tokens of this data set."""
        if self.manifest.vocab_size > vocab_size:
            raise UserError(
                f"data set {self.location} has a vocabulary of {self.manifest.vocab_size}, but model.vocab_size is "
                f"{vocab_size}; it must be at least as large"
            )

    def require_same_tokenizer(self, other: Dataset) -> None:
        """Refuse two data sets whose token ids mean different things."""
        mine, others = self.manifest.tokenizer_sha256, other.manifest.tokenizer_sha256
        if mine != others:
            raise UserError(
                f"data set {self.location} was made with tokenizer {mine[:12]}, but {other.location} with "
                f"{others[:12]}; prepare both with the same one"
            )

    def is_made_with(self, tokenizer: Tokenizer) -> bool:
        """Whether token ids mean the same to a tokenizer and to the one that made this data set.

        The latter lies beside a local data set. Where it does not, only the very same file will do.
        """
        if tokenizer.sha256 == self.manifest.tokenizer_sha256:
            return True
        file = Path(self.location).parent / TOKENIZER_FILE
        if _is_remote(self.location) or not file.is_file():
            return False
        own = load_tokenizer(file)
        return own.sha256 == self.manifest.tokenizer_sha256 and mean_the_same(own, tokenizer)

    def open_shard(self, number: int) -> OpenShard:
        """A shard, to read chunks from.

        Raises:
            DamageError: its index is missing or not the one of this shard; for a remote shard, it cannot be fetched.
        """
        return OpenShard(self, self.manifest.shards[number])


class OpenShard:
    """A shard whose index is in memory, and its tokens too if it is remote. `Dataset.open_shard` makes it."""

    def __init__(self, dataset: Dataset, shard: Shard) -> None:
        self.place = _join(dataset.location, shard.file)
        self._token_type = on_disk(dataset.manifest.token_type)
        self._vocab_size = dataset.manifest.vocab_size
        index_place = _join(dataset.location, shard.index_file)
        try:
            self.chunks = _parse_index(dataset, shard, index_place).chunks
            self._data = _read(self.place) if _is_remote(dataset.location) else None
        except OSError as error:
            raise DamageError(f"cannot read shard {self.place} and its index: {error}; {RESTORE}") from None

    def read(self, number: int) -> ChunkTokens:
        """A chunk.

        Raises:
            DamageError: it is cut short or changed, or holds what no tokenizer wrote.
        """
        chunk, data = self.chunks[number], self._bytes(number)
        lengths_at, names_at = chunk.lengths_at(self._token_type.itemsize), chunk.names_at(self._token_type.itemsize)
        tokens = np.frombuffer(data, self._token_type, chunk.tokens)
        lengths = np.frombuffer(data[lengths_at:names_at], LENGTH_TYPE, chunk.documents)
        offsets = np.zeros(chunk.documents + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if offsets[-1] != chunk.tokens:
            raise self._damage(number, f"its documents have {offsets[-1]} tokens, but the index names {chunk.tokens}")
        largest = int(tokens.max())
        if largest >= self._vocab_size:
            raise self._damage(number, f"it holds token {largest}, outside the vocabulary of {self._vocab_size}")
        return ChunkTokens(tokens, offsets)

    def names(self, number: int) -> list[str]:
        """The names of the documents of a chunk.

        Raises:
            DamageError: as for `read`.
        """
        names: list[str] = json.loads(self._bytes(number)[self.chunks[number].names_at(self._token_type.itemsize) :])
        return names

    def _bytes(self, number: int) -> bytes:
        chunk = self.chunks[number]
        size = chunk.bytes(self._token_type.itemsize)
        try:
            data = self._range(chunk.start, size)
        except OSError as error:
            raise self._damage(number, f"it cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise self._damage(number, f"the file ends {size - len(data)} bytes before it does")
        # Without it a flipped bit would be trained on.
        if zlib.crc32(data) != chunk.crc32:
            raise self._damage(number, "its bytes do not have the checksum that the index names")
        return data

    def _range(self, start: int, size: int) -> bytes:
        if self._data is not None:
            return self._data[start : start + size]
        with Path(self.place).open("rb") as file:  # buffered, it goes on where one call to the system ends, at 2 GiB
            file.seek(start)
            return file.read(size)

    def _damage(self, number: int, reason: str) -> DamageError:
        chunk = self.chunks[number]
        return DamageError(f"shard {self.place} is damaged: chunk {number} at byte {chunk.start}: {reason}; {RESTORE}")


def _parse_index(dataset: Dataset, shard: Shard, place: str) -> ShardIndex:
    try:
        index = parse_stored(ShardIndex, _read(place), place)
    except UserError as error:
        raise DamageError(str(error)) from None
    if (index.shard, index.tokenizer_sha256) != (shard, dataset.manifest.tokenizer_sha256):
        raise DamageError(f"{place} is not the index of the shard that the manifest names; {RESTORE}")
    return index


def _is_remote(location: str) -> bool:
    return location.startswith("pipe:") or "://" in location


def _checked(location: str) -> str:
    """A location with `~` replaced by the home folder.

    Raises:
        UserError: nothing opens URLs of its scheme, or it is no path of this machine.
    """
    if not _is_remote(location):
        return str(local_path(location))
    scheme = "pipe" if location.startswith("pipe:") else location.partition("://")[0]
    known = sorted({*gopen_schemes, "file"} - {"__default__"})
    if scheme not in known:
        raise UserError(
            f"data set {location} cannot be opened: webdataset knows the schemes {', '.join(known)}; let a command "
            f"fetch it, pipe:COMMAND with {{file}} for the name of a file"
        )
    return location


def _join(location: str, file: str) -> str:
    return location.replace("{file}", file) if "{file}" in location else f"{location.rstrip('/')}/{file}"


def _read(place: str) -> bytes:
    """The whole file there; raises OSError, or `UserError` for what is no file."""
    if not _is_remote(place):
        require_file(Path(place))
        return Path(place).read_bytes()
    with gopen(place) as stream:
        data = stream.read()
    return bytes(data)


def read_manifest(location: str | Path) -> Manifest:
    """The manifest of a data set; its shards are not looked at.

    Raises:
        UserError: it is missing, unreadable or of another format version.
    """
    place = _join(_checked(str(location)), MANIFEST)
    try:
        return parse_manifest(_read(place), place)
    except FileNotFoundError:
        inside = Path(location, TRAIN)
        way_out = f"give {inside}" if (inside / MANIFEST).is_file() else "make one with tools/prepare_data.py"
        raise UserError(f"{location} holds no complete data set ({MANIFEST} is missing); {way_out}") from None
    except NotADirectoryError:
        raise UserError(
            f"{location} is no folder, as a data set is; make one with tools/prepare_data.py, or if these are "
            f"fine-tuning examples, name their format"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror or error}") from None


def find_datasets(folder: str | Path) -> dict[str, Dataset]:
    """The data set in a folder, or the training and held-out ones in the output of `tools/prepare_data.py`, by name.

    The shards are not looked at. Raises `UserError` as `read_manifest` does.
    """
    folder = local_path(folder)
    if not (folder / TRAIN).is_dir():
        return {folder.name: Dataset.open(folder, check_sizes=False)}
    train = Dataset.open(folder / TRAIN, check_sizes=False)
    if not train.manifest.validation_share:
        return {TRAIN: train}
    return {TRAIN: train, VALIDATION: Dataset.open(folder / VALIDATION, check_sizes=False)}


def check_dataset(dataset: Dataset) -> list[str]:
    """Read everything; one sentence for each shard or chunk that is not as it should be."""
    problems: list[str] = []
    for shard in tqdm(dataset.manifest.shards, unit=" shards", leave=False, disable=None):
        problems += _check_shard(dataset, shard)
    return problems


def _check_shard(dataset: Dataset, shard: Shard) -> Iterator[str]:
    try:
        opened = OpenShard(dataset, shard)
    except DamageError as error:
        yield str(error)
        return
    sound = True
    for number in range(len(opened.chunks)):
        try:
            tokens, offsets = opened.read(number)
            opened.names(number)
        except DamageError as error:
            sound = False
            yield str(error)
            continue
        open_ended = int((tokens[offsets[1:] - 1] != dataset.manifest.eos_id).sum())
        if open_ended:
            yield f"shard {opened.place}: {open_ended} documents do not end with token {dataset.manifest.eos_id}"
    if sound and sha256_of(opened.place) != shard.sha256:
        yield f"shard {opened.place} differs between its chunks from what the manifest names; {RESTORE}"
