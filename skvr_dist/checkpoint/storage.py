"""Tensors on disk: a file of plain bytes per rank, and a JSON index.

Every tensor is stored whole, cut into the rectangles that the ranks held; any other set of rectangles can be read back
from it. torch plans which rank writes and reads what. It would keep the index as a pickle, which could run anything
when it is opened, and each rectangle as a zip file of its own. Here the index is JSON, and a file per rank holds the
elements of its rectangles as they are in memory (little-endian): less work beside training, and nothing to unpickle.

The index holds the SHA-256 of each rectangle by blocks, so a reader of a part of a rectangle compares just that part,
and reads nothing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from skvr_dist.checkpoint.pieces import Piece, Pieces
from skvr_dist.errors import UserError
from skvr_dist.host_group import HostGroup

INDEX_FILE = "index.json"
TENSORS_SUFFIX = ".distcp"
_BLOCK_BYTES = 1 << 20
"""Bytes of a rectangle that are hashed and written at a time, and that share a digest. Work on so many releases the
GIL, which training needs; they fit into a CPU cache; digests add a 16,000th of the size of the tensors; and ranks that
share a rectangle read no more than one block each beyond their part."""
_OLDER_BLOCK_BYTES = 1 << 22  # where the index does not say how many share a digest
_SYNC_BYTES = 1 << 25


@dataclass(frozen=True)
class _Stored:
    """Where a rectangle's bytes are on disk."""

    relative_path: str
    offset: int
    length: int
    sha256: tuple[str, ...]
    """Digest of each block; empty where an older release wrote it."""
    block: int = _BLOCK_BYTES
    """Bytes of a block; the last one is shorter."""

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that some bytes lie in."""
        return range(start // self.block, -(-stop // self.block))

    def bytes_of(self, number: int) -> slice:
        """Where a block lies in the rectangle."""
        return slice(number * self.block, min((number + 1) * self.block, self.length))


@dataclass(frozen=True)
class _Rectangle:
    """A piece that a rank would write."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, name: str, piece: Piece) -> _Rectangle:
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        return cls(name, piece.shape, dtype, piece.offsets, tuple(piece.tensor.shape))


def write_pieces(
    folder: Path,
    pieces: Pieces,
    group: HostGroup | None = None,
    *,
    pause: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Store what all ranks hold; collective over `group`, None for a process alone.

    No two ranks may hold overlapping pieces of a tensor, unless they are the same: then the first one writes. Pieces
    are asked for their tensor when it is written, one after the other.

    Args:
        pause: called after each block with its number of bytes; it may sleep.

    Returns:
        SHA-256 of the files with tensors that this rank wrote, by name.

    Raises:
        UserError: on all ranks: a file cannot be written, or what a piece raises that is read when it is written.
    """
    held = [(_Rectangle.of(name, piece), piece) for name, each in pieces.items() for piece in each]
    everybodys = group.gather_to_first([rectangle for rectangle, _ in held]) if group else [[r for r, _ in held]]
    is_mine = _first_holders(everybodys) if everybodys is not None else None
    mine = group.scatter_from_first(is_mine) if group else is_mine[0]  # type: ignore[index]
    name = f"__{group.rank if group else 0}_0{TENSORS_SUFFIX}"
    problem, digests = None, {}
    placed: list[tuple[_Rectangle, _Stored]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        placed, digests[name] = _write_file(folder / name, list(itertools.compress(held, mine)), pause)
    except Exception as error:  # of any kind: the others wait to hear of it
        problem = str(error) if isinstance(error, UserError) else _not_written(folder, error)
    written = group.gather_to_first((placed, problem)) if group else [(placed, problem)]
    if written is not None:
        problem = next((said for _, said in written if said), None) or _write_index(folder, [p for p, _ in written])
    if group:
        problem = group.from_first(problem)
    if problem:
        raise UserError(problem)
    return digests


def _first_holders(ranks: list[list[_Rectangle]]) -> list[list[bool]]:
    """For each rectangle of each rank, whether no rank before it holds the same."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    first = []
    for rectangles in ranks:
        first.append([(r.name, r.offsets) not in seen for r in rectangles])
        seen.update((r.name, r.offsets) for r in rectangles)
    return first


def _write_file(
    file: Path, rectangles: list[tuple[_Rectangle, Piece]], pause: Callable[[int], None]
) -> tuple[list[tuple[_Rectangle, _Stored]], str]:
    """Write a rank's rectangles one after the other; returns where each is, and the digest of the file."""
    digest, unsynced = hashlib.sha256(), 0
    placed: list[tuple[_Rectangle, _Stored]] = []
    with file.open("wb") as opened:
        for rectangle, piece in rectangles:
            elements = piece.load().detach().cpu().contiguous().reshape(-1)
            content: NDArray[np.uint8] = elements.view(torch.uint8).numpy()
            offset, blocks = opened.tell(), []
            for start in range(0, len(content), _BLOCK_BYTES):
                block = content[start : start + _BLOCK_BYTES]
                blocks.append(hashlib.sha256(block.data).hexdigest())
                digest.update(block.data)
                opened.write(block.data)
                unsynced += len(block)
                if unsynced >= _SYNC_BYTES:  # bit by bit, or the disk would be busy with all of it at the end
                    os.fdatasync(opened.fileno())
                    unsynced = 0
                pause(len(block))
            placed.append((rectangle, _Stored(file.name, offset, len(content), tuple(blocks))))
        opened.flush()
        os.fsync(opened.fileno())
    return placed, digest.hexdigest()


def _write_index(folder: Path, ranks: list[list[tuple[_Rectangle, _Stored]]]) -> str | None:
    """Write where every rectangle of every rank is; returns what went wrong."""
    tensors: dict[str, Any] = {}
    for rectangle, place in itertools.chain.from_iterable(ranks):
        tensor = tensors.setdefault(
            rectangle.name,
            {
                "shape": list(rectangle.shape),
                "dtype": rectangle.dtype,
                "chunks": [],
                "sha256": [],
                "block": _BLOCK_BYTES,
            },
        )
        chunk = [list(rectangle.offsets), list(rectangle.sizes), place.relative_path, place.offset, place.length]
        tensor["chunks"].append(chunk)
        tensor["sha256"].append(place.sha256)
    try:
        (folder / INDEX_FILE).write_text(json.dumps(tensors), encoding="utf-8")
    except OSError as error:
        return _not_written(folder, error)
    return None


def _not_written(folder: Path, error: BaseException) -> str:
    return f"checkpoint {folder} could not be written ({_in_words(error)}); free space or rights"


def _in_words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Index:
    """The tensors that a checkpoint holds. What is read of them is compared with its digest, if it has one.

    Args:
        folder: of the checkpoint.
        content: of its index.
    """

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder = folder
        tensors: Mapping[str, Any] = json.loads(content)
        self.described: dict[str, TensorStorageMetadata] = {}
        self.stored: dict[MetadataIndex, _Stored] = {}
        self._sizes: dict[MetadataIndex, torch.Size] = {}
        self.has_digests = True
        """Whether every tensor has digests of its own; else only the manifest has some, of whole files."""
        self.bytes_read = 0
        """Bytes of tensors that were read so far."""
        for name, tensor in tensors.items():
            self.has_digests &= "sha256" in tensor
            chunks, digests = [], tensor.get("sha256", [()] * len(tensor["chunks"]))
            block = tensor.get("block", _OLDER_BLOCK_BYTES)
            for (offsets, sizes, path, offset, length), blocks in zip(tensor["chunks"], digests, strict=True):
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                index = MetadataIndex(name, chunk.offsets)
                chunks.append(chunk)
                self.stored[index] = _Stored(path, offset, length, tuple(blocks), block)
                self._sizes[index] = chunk.sizes
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            self.described[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.described)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor; raises `UserError` if there is none of that name."""
        return tuple(self.tensor(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor; raises `UserError` if there is none of that name."""
        return self.tensor(name).properties.dtype

    def tensor(self, name: str) -> TensorStorageMetadata:
        """Raises `UserError` if there is none."""
        if name not in self.described:
            raise UserError(f"checkpoint {self.folder} has no tensor {name}; it is one of another architecture")
        return self.described[name]

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the host.

        Raises:
            UserError: as `read_pieces`.
        """
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        self.read_pieces({name: [Piece(tuple(tensor.shape), (0,) * tensor.dim(), tensor)]})
        return tensor

    def read_pieces(
        self,
        pieces: Pieces,
        group: HostGroup | None = None,
        neighbours: dist.ProcessGroup | None = None,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Read into the memory of pieces, whatever layout wrote them; collective over `group`, None for one process.

        Args:
            neighbours: ranks, over gloo, that need many of the same bytes: one of them reads those for the others.
            before: called first on each rank; what it raises is raised on all.

        Raises:
            UserError: a tensor is missing or has another shape, or a file cannot be read or was changed.
        """
        problem, parts = None, []
        try:
            parts = [part for name, held in pieces.items() for part in self._parts(name, held)]
            before()
        except (UserError, OSError) as error:
            problem = self._problem(error)
        if group:
            problem = group.first_problem(problem)
        if problem is None:
            problem = self._read_parts(parts, neighbours)
            if group:
                problem = group.first_problem(problem)
        if problem:
            raise UserError(problem)

    def _problem(self, error: UserError | OSError) -> str:
        if isinstance(error, UserError):
            return str(error)
        return f"checkpoint {self.folder} could not be read ({_in_words(error)}); use another"

    def _parts(self, name: str, held: list[Piece]) -> list[tuple[ReadItem, Piece]]:
        """What must be read of a tensor to fill some pieces of it, and the piece that each part lies in."""
        stored = self.tensor(name)
        wrong = next((piece for piece in held if tuple(stored.size) != piece.shape), None)
        if wrong is not None:
            raise UserError(
                f"tensor {name} has shape {list(stored.size)} in {self.folder}, but {list(wrong.shape)} in this "
                f"configuration; use the model section of the checkpoint's config.yaml"
            )
        chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.size()) for piece in held]
        by_offsets = {piece.offsets: piece for piece in held}
        items = create_read_items_for_chunk_list(name, stored, chunks)
        return [(item, by_offsets[tuple(item.dest_index.offset or ())]) for item in items]

    def _read_parts(self, parts: list[tuple[ReadItem, Piece]], neighbours: dist.ProcessGroup | None) -> str | None:
        """Read a stored rectangle after the other; collective over `neighbours`. Returns what went wrong."""
        mine: dict[MetadataIndex, list[tuple[ReadItem, Piece]]] = {}
        for item, piece in parts:
            mine.setdefault(item.storage_index, []).append((item, piece))
        wanted = {index: {b for item, _ in of_it for b in self._blocks(item)} for index, of_it in mine.items()}
        plan = _reading_plan(wanted, self.stored, neighbours)
        problem = None
        for index, readers in plan.items():
            try:
                targets = [
                    (item, _rectangle(piece.tensor.detach(), item.dest_offsets, item.lengths))
                    for item, piece in mine.get(index, [])
                ]
                content = self._memory(index, targets)
                self._fetch(index, content, readers, wanted.get(index, set()), neighbours)
            except (UserError, OSError) as error:
                problem = problem or self._problem(error)
                continue
            for item, target in targets:
                part = self._part(item, content)
                if part.data_ptr() != target.data_ptr():
                    target.copy_(part)
        return problem

    def _memory(self, index: MetadataIndex, targets: list[tuple[ReadItem, Tensor]]) -> Tensor:
        """Where the bytes of a stored rectangle go: at once to where they are wanted, if that is one place of their
        shape; so a large tensor is in memory once."""
        length = self.stored[index].length
        if len(targets) == 1:
            target = targets[0][1]
            fits = target.nbytes == length and target.is_contiguous() and target.is_cpu and target.dim() > 0
            if fits and target.dtype == self.dtype(index.fqn):
                return target.view(-1).view(torch.uint8)
        return torch.empty(length, dtype=torch.uint8)  # memory is taken where something is written

    def _blocks(self, item: ReadItem) -> range:
        """The blocks of a stored rectangle that an item lies in."""
        return self.stored[item.storage_index].blocks(*self._span(item))

    def _span(self, item: ReadItem) -> tuple[int, int]:
        """The bytes of a stored rectangle that hold the rows which an item asks for: first, and one past the last."""
        index = item.storage_index
        sizes, length = self._sizes[index], self.stored[index].length
        first, count = (item.storage_offsets[0], item.lengths[0]) if sizes else (0, 1)
        row_bytes = length // (sizes[0] if sizes else 1)
        return first * row_bytes, (first + count) * row_bytes

    def _part(self, item: ReadItem, content: Tensor) -> Tensor:
        """The part of a stored rectangle that an item asks for, from the bytes of the rectangle."""
        start, stop = self._span(item)
        sizes = self._sizes[item.storage_index]
        elements = content[start:stop].view(self.dtype(item.storage_index.fqn))
        if not sizes:
            return elements[0]
        return _rectangle(elements.view(-1, *sizes[1:]), (0, *item.storage_offsets[1:]), item.lengths)

    def _fetch(
        self,
        index: MetadataIndex,
        content: Tensor,
        readers: dict[int, int | None],
        wanted: set[int],
        neighbours: dist.ProcessGroup | None,
    ) -> None:
        """Fill the wanted blocks of a stored rectangle; collective over `neighbours`.

        Args:
            content: its bytes, uint8.
            readers: the blocks to read in their order, and the neighbour that reads each for all; None where this rank
                reads for itself.

        Raises:
            OSError, UserError: what went wrong with a block, after all of them.
        """
        stored, problem = self.stored[index], None
        rank = neighbours.rank() if neighbours else None
        with contextlib.ExitStack() as stack:
            file = None
            for number, reader in readers.items():
                block = content[stored.bytes_of(number)]
                if reader == rank or reader is None:
                    try:
                        file = file or stack.enter_context((self.folder / stored.relative_path).open("rb"))
                        self._read_block(file, index, number, block)
                    except (OSError, UserError) as error:
                        problem = problem or error
                if reader is not None:
                    received = block if number in wanted else torch.empty_like(block)
                    dist.broadcast(received, group=neighbours, group_src=reader)
        if problem:
            raise problem

    def _read_block(self, file: io.BufferedReader, index: MetadataIndex, number: int, block: Tensor) -> None:
        """Fill a block of a stored rectangle, uint8, and compare it with its digest, if it has one.

        Raises:
            OSError: the file cannot be read, or ends there.
            UserError: it was changed.
        """
        stored, held = self.stored[index], block.numpy()
        self.bytes_read += len(held)
        file.seek(stored.offset + stored.bytes_of(number).start)
        if file.readinto(held.data) != len(held):
            raise OSError(None, f"ends within tensor {index.fqn}", file.name)
        if stored.sha256 and hashlib.sha256(held.data).hexdigest() != stored.sha256[number]:
            raise UserError(
                f"checkpoint {self.folder} is damaged: {stored.relative_path} changed since it was written (within "
                f"tensor {index.fqn}); use another"
            )

    def verify(self, name: str) -> None:
        """Compare a whole tensor with its digests.

        Raises:
            OSError: a file cannot be read.
            UserError: it was changed.
        """
        for chunk in self.tensor(name).chunks:
            index = MetadataIndex(name, chunk.offsets)
            stored = self.stored[index]
            with (self.folder / stored.relative_path).open("rb") as file:
                content = torch.empty(stored.block, dtype=torch.uint8)
                for number in stored.blocks(0, stored.length):
                    place = stored.bytes_of(number)
                    self._read_block(file, index, number, content[: place.stop - place.start])


def _reading_plan(
    wanted: dict[MetadataIndex, set[int]],
    stored: Mapping[MetadataIndex, _Stored],
    neighbours: dist.ProcessGroup | None,
) -> dict[MetadataIndex, dict[int, int | None]]:
    """Which rectangles a rank goes through, in the order in which they lie in the files, and who reads their blocks.

    What several neighbours want is read by one of them, in turn, and all go through it in the same order. What one
    alone wants is not in the plans of the others.

    Returns:
        by rectangle and block the reader's rank among the neighbours, None for this rank alone.
    """
    everybodys = [wanted]
    if neighbours:
        everybodys = [{}] * neighbours.size()
        dist.all_gather_object(everybodys, wanted, group=neighbours)
    takers: dict[tuple[MetadataIndex, int], list[int]] = {}
    for rank, theirs in enumerate(everybodys):
        for index, numbers in theirs.items():
            for number in numbers:
                takers.setdefault((index, number), []).append(rank)
    plan: dict[MetadataIndex, dict[int, int | None]] = {}

    def place(block: tuple[MetadataIndex, int]) -> tuple[str, int, int]:
        index, number = block
        return stored[index].relative_path, stored[index].offset, number

    for turn, block in enumerate(sorted(takers, key=place)):
        index, number = block
        if len(takers[block]) > 1:
            plan.setdefault(index, {})[number] = takers[block][turn % len(takers[block])]
        elif number in wanted.get(index, set()):
            plan.setdefault(index, {})[number] = None
    return plan


def _rectangle(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
