"""One run per folder: a lock that the hosts of a shared file system respect, and that no dead process holds.

    lock/00000001.json      its holder: host, process, since when, the run; and a count that rises while it lives

The file with the highest number counts. Its holder rewrites it every few seconds. A process that wants the lock looks
for the holder's process if both share one space of process numbers, and otherwise watches whether the count rises: no
clocks of two hosts are compared. If the holder is gone it creates the file with the next number, which the file system
lets only one process do. So a process that is killed leaves nothing that must be cleaned up.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skvr_dist.errors import EXIT_USAGE, UserError
from skvr_dist.run.folder import RunFolder

_BEAT_SECONDS = 2.0
# A file system that many hosts write to may stand still for a while.
_PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 0.2


class RunLock:
    """The right to write to a run's folder, from its construction to the end of the process or `release`.

    Args:
        folder: of the run; it may not exist yet.
        run: the run's id, for people.
        beat_seconds: between signs of life.
        patience_seconds: without a sign of life of a holder on another host, after which it is taken for dead.

    Raises:
        UserError: another process holds it; or nothing can be written there.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        beat_seconds: float = _BEAT_SECONDS,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._run_folder, self._folder = folder, RunFolder(folder).lock
        self._beat_seconds, self._patience_seconds = beat_seconds, patience_seconds
        self._record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": run,
            "processes": _process_space(),
            "process_start": _process_start(os.getpid()),
            "state": "held",
        }
        self._beats = 0
        self._ended = threading.Event()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._record["folder"] = self._folder.stat().st_ino
            self._number = self._take()
        except OSError as error:
            raise UserError(
                f"cannot lock {folder} ({error.strerror}: {error.filename}); give train.output_dir space, rights and a "
                f"file system that all hosts share"
            ) from None
        # After the threads that write checkpoints have ended: what they write is written under the lock.
        atexit.register(self.release)
        self._thread = threading.Thread(target=self._live, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock."""
        atexit.unregister(self.release)
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            self._record["state"] = "free"
            with contextlib.suppress(OSError):
                self._write("r+b")

    def _take(self) -> int:
        while True:
            last = _newest(self._folder)
            if last:
                self._require_free(last)
            self._number = last + 1
            try:
                self._write("xb")  # for one process only, on any host
            except FileExistsError:
                continue
            if _newest(self._folder) == self._number:
                for number in _numbers(self._folder):
                    if number < self._number:
                        self._file(number).unlink(missing_ok=True)
                return self._number
            self._file(self._number).unlink(missing_ok=True)  # others came and went since `last` was read

    def _require_free(self, number: int) -> None:
        """Return when the holder is found gone.

        Raises:
            UserError: it lives.
        """
        found = self._read(number)
        began, patience, watched = time.monotonic(), self._patience_seconds, False
        while True:
            holder = _parsed(found)
            if holder.get("state") == "free":
                return
            if holder and holder["processes"] and holder["processes"] == self._record["processes"]:
                if _process_start(holder["pid"]) != holder["process_start"]:
                    return
                if holder.get("folder", self._record["folder"]) == self._record["folder"]:
                    raise UserError(self._refusal(holder))
                # It holds the folder that this one was copied from, unless it goes on writing here: some file systems
                # number a folder anew.
                patience = min(patience, 3 * self._beat_seconds)
            if time.monotonic() > began + patience:
                return
            if not watched and holder:
                watched = True
                print(
                    f"{self._run_folder} was in use by process {holder['pid']} on {holder['host']}; waiting up to "
                    f"{patience:.0f} s for a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(_LOOK_SECONDS)
            before, found = found, self._read(number)
            if found != before and _parsed(before) and _parsed(found).get("state") == "held":
                raise UserError(self._refusal(_parsed(found)))

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self._run_folder} is in use: process {holder['pid']} on {holder['host']} trains run {holder['run']} "
            f"there since {holder['since']}; wait for its end, end it, or give another train.output_dir"
        )

    def _live(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # the file system may come back
                if self._is_lost():
                    print(
                        f"error: another process has taken {self._run_folder} over while this one stood still, or "
                        f"after it was removed; it ends, so that the two do not write to one folder",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(EXIT_USAGE)
                self._beats += 1
                self._write("r+b")

    def _is_lost(self) -> bool:
        """Whether another process holds the lock: under the next number, or, if the folder was removed meanwhile, under
        any, even that of this one."""
        if (newest := _newest(self._folder)) != self._number:
            return newest > 0
        found = _parsed(self._read(newest))
        return any(found.get(key, own) != own for key, own in self._record.items() if key != "state")

    def _write(self, mode: str) -> None:
        """Write the record, always of the same length, so that a reader never finds a mixture of two."""
        content = json.dumps({**self._record, "beat": f"{self._beats:012d}"}).encode()
        with self._file(self._number).open(mode) as file:
            file.write(content)

    def _read(self, number: int) -> bytes:
        """Content of a lock file; `free` if the file is gone, because its holder has lost the lock to others."""
        try:
            return self._file(number).read_bytes()
        except FileNotFoundError:
            return b'{"state": "free"}'

    def _file(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"


def _parsed(content: bytes) -> dict[str, Any]:
    """The record; nothing while it is being written."""
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _numbers(folder: Path) -> list[int]:
    return [int(file.stem) for file in folder.glob("*.json") if file.stem.isdecimal()]


def _newest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _process_space() -> str:
    """Identifies a space of process numbers: a boot of a host, and a container's namespace; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Start time, which tells a process from a later one of the same number; empty if it is not running."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
