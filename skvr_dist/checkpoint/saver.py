"""Writes the checkpoints of a run while it trains."""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import (
    forget_old,
    partial_folder,
    publish,
    step_folder,
    write_facts,
)
from skvr_dist.checkpoint.pieces import Pieces
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.host_group import HostGroup


class Saver:
    """Saves a copy of the state in a thread of its own; at most one save is under way.

    Args:
        checkpoints: the run's folder of checkpoints.
        group: all ranks; nobody else's, because the ranks' threads talk to each other over it
            while the ranks themselves train.
        config_text: the resolved configuration.
        files: content of the tokenizer's files by name, which go into each checkpoint.
        keep_last: newest checkpoints to keep.
        keep_every_steps: keep those of every n-th step too; None keeps none of them.
        megabytes_per_second: speed at which this rank writes until somebody waits for the save; None sets no limit.
    """

    def __init__(
        self,
        checkpoints: Path,
        group: HostGroup,
        *,
        config_text: str,
        files: Mapping[str, bytes],
        keep_last: int,
        keep_every_steps: int | None,
        megabytes_per_second: float | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        self._config_text = config_text
        self._files = files
        self._keep: dict[str, Any] = {"keep_last": keep_last, "keep_every_steps": keep_every_steps}
        self._group = group
        self._bytes_per_second = 1e6 * megabytes_per_second if megabytes_per_second else math.inf
        self._awaited = threading.Event()
        self._copied: Pieces = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: Pieces, facts: Facts, done: Callable[[Path], None]) -> None:
        """Copy the state of the step that the facts name, and start to write it; collective. Waits for the save before.

        Args:
            facts: the content of checkpoint.json.
            done: called with the finished folder, on rank 0, from the thread.

        Raises:
            UserError: the save before failed.
        """
        self.finish()
        self._copy(state)

        def write() -> None:
            try:
                self._write(self._copied, facts, done)
            except BaseException as error:
                self._error = error

        self._awaited.clear()
        self._thread = threading.Thread(target=write, name=f"save step {facts.step}")
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether `finish` would raise at once what a save has met."""
        return self._error is not None

    def finish(self) -> None:
        """Wait for the save that is under way.

        Raises:
            UserError: it failed; nothing was published, and earlier checkpoints stand.
        """
        self._awaited.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Let the save that is under way come to its end when this rank meets something of its own within.

        The others go on writing in their threads meanwhile. Not when a rank is gone, which they would wait for.
        """
        try:
            yield
        except RunInterrupted:
            raise
        except Exception:
            with suppress(Exception):  # the first error counts
                self.finish()
            raise

    def _copy(self, state: Pieces) -> None:
        """Copy into the memory of the save before: new pages each time would slow down the steps meanwhile."""
        if _layout(self._copied) != _layout(state):  # the first save, or the first with moments
            self._copied = {}
            self._copied = {name: [piece.copy() for piece in pieces] for name, pieces in state.items()}
            return
        for name, pieces in state.items():
            for copy, piece in zip(self._copied[name], pieces, strict=True):
                copy.tensor.copy_(piece.tensor.detach())

    def _pause(self, written: int) -> None:
        """Sleep after writing that many bytes, to keep to the speed; not once somebody waits for the save."""
        self._awaited.wait(written / self._bytes_per_second)

    def _write(self, state: Pieces, facts: Facts, done: Callable[[Path], None]) -> None:
        partial, final = (self._checkpoints / name(facts.step) for name in (partial_folder, step_folder))
        try:
            self._fill(partial, final, state, facts)
        except UserError:  # on all ranks, so that none of them writes there any longer
            if self._group.rank == 0:  # on a full disk nothing else could be written
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self._group.rank == 0:
            done(final)

    def _fill(self, partial: Path, final: Path, state: Pieces, facts: Facts) -> None:
        """Write a checkpoint and give it its name; collective."""

        def begin() -> None:
            for left in self._checkpoints.glob("step-*.partial"):  # by interrupted saves, of whatever step
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            write_facts(partial, config_text=self._config_text, facts=facts, files=self._files)

        self._on_first_rank(begin, partial)
        mine = write_pieces(partial, state, self._group, pause=self._pause)
        digests = self._group.gather_to_first(mine)

        def complete() -> None:
            publish(partial, final, {name: digest for part in digests or [] for name, digest in part.items()})
            forget_old(self._checkpoints, **self._keep)

        self._on_first_rank(complete, partial)

    def _on_first_rank(self, work: Callable[[], None], partial: Path) -> None:
        """Do work on rank 0 while the others wait; if it fails, raise on all of them."""
        failed = None
        if self._group.rank == 0:
            try:
                work()
            except OSError as error:
                failed = f"{error.strerror}: {error.filename}"
            except UserError as error:
                failed = str(error)
        said = self._group.from_first(failed)
        if said:
            raise UserError(
                f"checkpoint {partial} could not be written ({said}); give train.output_dir space, rights and "
                f"a file system that all hosts share"
            )


def _layout(state: Pieces) -> dict[str, list[tuple[Any, ...]]]:
    """Shapes and dtypes of a state; states with equal ones can share the memory of their copies."""
    return {name: [(p.shape, p.offsets, p.tensor.dtype) for p in pieces] for name, pieces in state.items()}
