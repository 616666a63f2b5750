"""Tensors on disk: torch.distributed.checkpoint, with plain bytes and a JSON index.

Every tensor is stored whole, cut into the rectangles that the ranks held; any other set of rectangles can be read back
from it. torch plans which rank writes and reads what. It would keep the index as a pickle, which could run anything
when it is opened, and each rectangle as a zip file of its own. Here the index is JSON, and a file per rank holds the
elements of its rectangles as they are in memory (little-endian): less work beside training, and nothing to unpickle.

The index holds the SHA-256 of each rectangle by blocks, so a reader of a part of a rectangle compares just that part,
and reads nothing twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import CheckpointException
from torch.futures import Future

from skvr_dist.checkpoint.pieces import Piece, Pieces
from skvr_dist.errors import UserError

INDEX_FILE = "index.json"
# Hashing and writing blocks of this size releases the GIL, which training needs; and a block fits into a CPU cache.
_BLOCK_BYTES = 1 << 20
_SYNC_BYTES = 1 << 25
_DIGEST_BYTES = 1 << 22
"""Bytes of a rectangle that share a digest; part of the format. Digests add a 60,000th of the size of the tensors."""


@dataclass(frozen=True)
class _Stored:
    """Where a rectangle's bytes are on disk."""

    relative_path: str
    offset: int
    length: int
    sha256: tuple[str, ...]
    """Digest of each block of `_DIGEST_BYTES`, the last one shorter; empty where an older release wrote it."""


def write_pieces(
    folder: Path,
    pieces: Pieces,
    group: dist.ProcessGroup | None = None,
    *,
    alone: bool = False,
    pause: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Store what all ranks hold; collective over `group`, or `alone` in a process without any.

    No two ranks may hold overlapping pieces of a tensor, unless they are the same. Pieces are asked for their tensor
    when it is written, one after the other.

    Args:
        pause: called after each block with its number of bytes; it may sleep.

    Returns:
        SHA-256 of the files with tensors that this rank wrote, by name.

    Raises:
        UserError: a file cannot be written, or what a piece raises that is read when it is written.
    """
    writer, planner = _Writer(folder, pause), _PieceSavePlanner()
    _let_one_process_be()
    try:
        dcp.save(dict(pieces), storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    except (CheckpointException, OSError) as error:
        cause = _first_cause(error)
        if isinstance(cause, UserError):  # of a piece that is read when it is written
            raise cause from None
        raise UserError(
            f"checkpoint {folder} could not be written ({_in_words(cause)}); free space or rights"
        ) from None
    return writer.digests


def _let_one_process_be() -> None:
    """Keep torch from warning that there is no process group, where there is to be none."""
    warnings.filterwarnings("ignore", r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning)


def _first_cause(error: BaseException) -> BaseException:
    """Torch gathers the failures of all ranks in one exception."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


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
        self.has_digests = True
        """Whether every tensor has digests of its own; else only the manifest has some, of whole files."""
        for name, tensor in tensors.items():
            self.has_digests &= "sha256" in tensor
            chunks, digests = [], tensor.get("sha256", [()] * len(tensor["chunks"]))
            for (offsets, sizes, path, offset, length), blocks in zip(tensor["chunks"], digests, strict=True):
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                self.stored[MetadataIndex(name, torch.Size(offsets))] = _Stored(path, offset, length, tuple(blocks))
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
        self, pieces: Pieces, group: dist.ProcessGroup | None = None, *, before: Callable[[], None] = lambda: None
    ) -> None:
        """Read into the memory of pieces, whatever layout wrote them; collective over `group`, None for one process.

        Args:
            before: called first on each rank; what it raises is raised on all.

        Raises:
            UserError: a tensor is missing or has another shape, or a file cannot be read or was changed.
        """
        reader, planner = _Reader(self, before), _PieceLoadPlanner(self)
        _let_one_process_be()
        try:
            dcp.load(dict(pieces), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
        except (CheckpointException, OSError) as error:
            cause = _first_cause(error)
            if isinstance(cause, UserError):  # whichever rank met it
                raise UserError(str(cause)) from None
            raise UserError(f"checkpoint {self.folder} could not be read ({_in_words(cause)}); use another") from None

    def verify(self, name: str) -> None:
        """Compare a whole tensor with its digests.

        Raises:
            OSError: a file cannot be read.
            UserError: it was changed.
        """
        for chunk in self.tensor(name).chunks:
            stored = self.stored[MetadataIndex(name, chunk.offsets)]
            with (self.folder / stored.relative_path).open("rb") as file:
                for start in range(0, stored.length, _DIGEST_BYTES):
                    self.read_bytes(file, name, stored, start, min(start + _DIGEST_BYTES, stored.length))

    def read_bytes(self, file: io.BufferedReader, name: str, stored: _Stored, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of a rectangle of a tensor, uint8; the blocks that they lie in are compared.

        Raises:
            OSError: the file cannot be read, or ends there.
            UserError: it was changed.
        """
        first, last = start, stop
        if stored.sha256:
            first, last = start - start % _DIGEST_BYTES, min(-(-stop // _DIGEST_BYTES) * _DIGEST_BYTES, stored.length)
        content = torch.empty(last - first, dtype=torch.uint8)
        held: NDArray[np.uint8] = content.numpy()
        file.seek(stored.offset + first)
        if file.readinto(held.data) != len(held):
            raise OSError(None, f"ends within tensor {name}", file.name)
        for begin in range(0, len(held) if stored.sha256 else 0, _DIGEST_BYTES):
            block = held[begin : begin + _DIGEST_BYTES]
            if hashlib.sha256(block.data).hexdigest() != stored.sha256[(first + begin) // _DIGEST_BYTES]:
                raise UserError(
                    f"checkpoint {self.folder} is damaged: {stored.relative_path} changed since it was written (within "
                    f"tensor {name}); use another"
                )
        return content[start - first : stop - first]


class _PieceSavePlanner(SavePlanner):
    """Plans a write per piece; of equal pieces on several ranks one is written."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._pieces: Pieces = state_dict

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(name, piece) for name, held in self._pieces.items() for piece in held])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: set[MetadataIndex] = set()
        unique = []
        for plan in all_plans:
            unique.append(SavePlan([item for item in plan.items if item.index not in seen]))
            seen.update(item.index for item in plan.items)
        return create_default_global_save_plan(unique)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        offset = write_item.index.offset
        assert offset is not None
        return next(p for p in self._pieces[write_item.index.fqn] if p.offsets == tuple(offset)).load()


def _write_item(name: str, piece: Piece) -> WriteItem:
    offsets = torch.Size(piece.offsets)
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=piece.tensor.size()),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )


class _PieceLoadPlanner(LoadPlanner):
    """Plans the reads that fill every piece."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._pieces: Pieces = state_dict

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for name, held in self._pieces.items():
            stored = self._index.tensor(name)
            wrong = next((piece for piece in held if tuple(stored.size) != piece.shape), None)
            if wrong is not None:
                raise UserError(
                    f"tensor {name} has shape {list(stored.size)} in {self._index.folder}, but {list(wrong.shape)} in "
                    f"this configuration; use the model section of the checkpoint's config.yaml"
                )
            chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.size()) for piece in held]
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        held = self._pieces[read_item.dest_index.fqn]
        target = next(piece.tensor for piece in held if piece.offsets == tuple(offset)).detach()
        return _rectangle(target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor was read in place."""


class _Writer(FileSystemWriter):
    """torch's writer, with a file of plain bytes per rank and the index as JSON."""

    def __init__(self, folder: Path, pause: Callable[[int], None]) -> None:
        super().__init__(folder)
        self._folder = folder
        self._pause = pause
        self.digests: dict[str, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, digest, results = f"{plan.storage_data.prefix}0.distcp", hashlib.sha256(), []
        unsynced = 0
        with (self._folder / name).open("wb") as file:
            for item in plan.items:
                rectangle = planner.resolve_data(item)
                assert isinstance(rectangle, Tensor) and item.tensor_data is not None
                assert rectangle.dtype == item.tensor_data.properties.dtype
                assert rectangle.shape == item.tensor_data.chunk.sizes
                elements = rectangle.detach().cpu().contiguous().reshape(-1)
                content: NDArray[np.uint8] = elements.view(torch.uint8).numpy()
                offset, blocks = file.tell(), []
                for start in range(0, len(content), _BLOCK_BYTES):
                    block = content[start : start + _BLOCK_BYTES]
                    if start % _DIGEST_BYTES == 0:
                        blocks.append(hashlib.sha256())
                    blocks[-1].update(block.data)
                    digest.update(block.data)
                    file.write(block.data)
                    unsynced += len(block)
                    if unsynced >= _SYNC_BYTES:  # bit by bit, or the disk would be busy with all of it at the end
                        os.fdatasync(file.fileno())
                        unsynced = 0
                    self._pause(len(block))
                place = _Stored(name, offset, len(content), tuple(block.hexdigest() for block in blocks))
                results.append(WriteResult(index=item.index, size_in_bytes=len(content), storage_data=place))
            file.flush()
            os.fsync(file.fileno())
        self.digests[name] = digest.hexdigest()
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        stored = {result.index: result.storage_data for written in results for result in written}
        tensors: dict[str, Any] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks, digests = [], []
            for chunk in tensor.chunks:
                place = stored[MetadataIndex(name, chunk.offsets)]
                chunks.append([list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length])
                digests.append(place.sha256)
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = {"shape": list(tensor.size), "dtype": dtype, "chunks": chunks, "sha256": digests}
        (self._folder / INDEX_FILE).write_text(json.dumps(tensors), encoding="utf-8")


class _Reader(FileSystemReader):
    """torch's reader of what `_Writer` wrote."""

    def __init__(self, index: Index, before: Callable[[], None]) -> None:
        super().__init__(index.folder)
        self._index = index
        self._before = before

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = dict(self._index.described)
        return Metadata(described, storage_data=self._index.stored, storage_meta=StorageMeta())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        self._before()
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._index.stored[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (self._index.folder / name).open("rb") as file:
                for item in items:
                    planner.resolve_tensor(item).copy_(self._read(item, file))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, file: io.BufferedReader) -> Tensor:
        """The part of a stored rectangle that an item asks for; only the rows that it needs are read."""
        index = item.storage_index
        described, stored = self._index.tensor(index.fqn), self._index.stored[index]
        sizes = next(chunk.sizes for chunk in described.chunks if chunk.offsets == index.offset)
        first, count = (item.storage_offsets[0], item.lengths[0]) if sizes else (0, 1)
        row_bytes = stored.length // (sizes[0] if sizes else 1)
        content = self._index.read_bytes(file, index.fqn, stored, first * row_bytes, (first + count) * row_bytes)
        rows = content.view(described.properties.dtype).view(count, *sizes[1:])
        return _rectangle(rows if sizes else rows[0], (0, *item.storage_offsets[1:]), item.lengths)


def _rectangle(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
