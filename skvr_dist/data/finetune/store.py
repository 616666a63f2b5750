"""The examples of a file as arrays of tokens, in memory or kept in a folder for all ranks and later runs.

A kept set is a folder with three arrays, which processes map into memory and share, and `set.json`. Its name is a
digest of what decides the tokens: the file's path, size and time, the tokenizer, and how examples are made. The first
process that needs it makes it, and the others of its host wait for that.

Shapes: N tokens of all examples, n examples.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.finetune.encode import Counts, Encoded
from skvr_dist.data.prepare.formats import reading
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, naming_failure, published

_FORM = 2
"""Raise it when the same file gives other tokens."""
_RECORD = "set.json"


@dataclass(frozen=True)
class EncodedSet:
    """Examples one after another."""

    ends: NDArray[np.int64]
    """[n]: where each example ends."""
    tokens: NDArray[np.uint32]
    """[N]."""
    predicted: NDArray[np.bool_]
    """[N]: whether a token has loss."""
    counts: Counts
    """What became of the records."""
    fingerprint: str
    """Equal for two sets of the same examples, as they were drawn and cut."""

    @classmethod
    def of(cls, examples: Iterable[Encoded], counts: Counts) -> EncodedSet:
        """All examples; `counts` is complete when they are read."""
        encoded = list(examples)
        ends = np.cumsum([len(example.tokens) for example in encoded], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, dtype=np.uint32), *(example.tokens for example in encoded)])
        predicted = np.concatenate([np.empty(0, dtype=np.bool_), *(example.predicted for example in encoded)])
        digest = hashlib.sha256()
        for array in (ends, tokens, predicted):
            digest.update(array.tobytes())
        return cls(ends, tokens, predicted, counts, digest.hexdigest()[:16])

    def example(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Tokens of an example, and which of them have loss."""
        place = slice(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))
        return self.tokens[place], self.predicted[place]

    def lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = np.diff(self.ends, prepend=0).tolist()
        return lengths


def kept_set(folder: str | Path, facts: dict[str, Any], file: Path, make: Callable[[], EncodedSet]) -> EncodedSet:
    """The set that `make` gives, from a folder of sets if it is there, else made and kept there.

    Args:
        facts: what decides the tokens besides the content of the file.
        file: that of the examples; another size or time makes another set.

    Raises:
        UserError: the folder cannot be written, or what it keeps is damaged; and what `make` raises.
    """
    folder = local_path(folder)
    with reading(file):
        status = file.stat()
    facts = {"form": _FORM, "file": str(file.absolute()), "bytes": status.st_size, "time": status.st_mtime_ns, **facts}
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    place = folder / name
    with naming_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder / f"{name}.lock"):
        if not place.exists():
            made = make()
            with published(place) as partial:
                for array in ("ends", "tokens", "predicted"):
                    np.save(partial / f"{array}.npy", getattr(made, array))
                record = {"facts": facts, "counts": asdict(made.counts), "fingerprint": made.fingerprint}
                (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return _kept(place)


def _kept(place: Path) -> EncodedSet:
    try:
        record = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ends", "tokens", "predicted")}
        return EncodedSet(**arrays, counts=Counts(**record["counts"]), fingerprint=record["fingerprint"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{place} of data.examples_cache is damaged ({reason}); remove it, to make it anew") from None


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a lock of this host's processes on a file; the system lets it go when a process dies."""
    with naming_failure(lock):
        file = lock.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
