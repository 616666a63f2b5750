"""The folder of a run, which holds everything that it writes; only this module knows the paths in it.

run.json          the run's id, what it was last told to resume from, and what last had it save and end
lock/             the process that writes here (`skvr_dist.run.lock`)
supervisor.json   what keeps it running on its hosts (`skvr_dist.cluster.supervisor`), while that lives
config.yaml       the resolved configuration
versions.json     the software, the command and the layout
metrics.jsonl     one record per logged step or evaluation
console.txt       what its ranks printed, where a sweep started them
logs/             one file per rank, DeepSpeed's messages among it (`skvr_dist.run.log`)
tensorboard/
checkpoints/      `skvr_dist.checkpoint.folder`
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from skvr_dist.errors import UserError
from skvr_dist.files import local_path, prove_folder, prove_writable, write_whole


class RunFolder:
    """Paths of a run, whether it is there yet or not, and its small files.

    Args:
        path: its `train.output_dir`; `~` is the home folder.

    Raises:
        UserError: it is no path of this machine.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.lock = self.path / "lock"
        self.supervisor = self.path / "supervisor.json"
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.console = self.path / "console.txt"
        self.versions = self.path / "versions.json"
        self._notes = self.path / "run.json"

    def prove_writable(self) -> None:
        """Find out before the work whether everything can be written; all is left as it was.

        Raises:
            UserError: something cannot; it names the path and the cause.
        """
        for folder in (self.checkpoints, self.logs, self.tensorboard, self.lock):
            prove_folder(folder)
        for file in (self.config, self.metrics, self.versions, self._notes):
            prove_writable(file, make_folder=True)

    def log(self, rank: int) -> Path:
        """The log file of a rank."""
        return self.logs / f"rank-{rank:05d}.log"

    def notes(self) -> dict[str, Any]:
        """The facts that `note` has written; empty if there are none.

        Raises:
            UserError: the file is damaged.
        """
        try:
            noted = json.loads(self._notes.read_bytes())
            if not isinstance(noted, dict):
                raise ValueError("it holds no facts")
        except OSError:
            return {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._notes} is damaged ({error}); remove it") from None
        return noted

    def note(self, **facts: Any) -> None:
        """Note facts of the run, beside those that are noted already; on one rank."""
        known = self.notes()
        if not facts.items() <= known.items():
            write_whole(self._notes, json.dumps({**known, **facts}, indent=2) + "\n")

    def note_interruption(self, signals: str, step: int) -> None:
        """Note that these signals have ended the run after a step, which is saved; on rank 0.

        No launcher's exit code tells it from the death of a rank, and another must follow it: this one is not mended by
        starting the run again at once.
        """
        self.note(interrupted={"by": signals, "after_step": step, "time": time.time()})

    def interruption(self) -> dict[str, Any] | None:
        """What `note_interruption` has noted last; None if it never has.

        Raises:
            UserError: the file is damaged.
        """
        noted = self.notes().get("interrupted")
        return noted if isinstance(noted, dict) else None

    def metric_records(self, about: str = "") -> list[dict[str, float]]:
        """The records of metrics.jsonl; without lines that are none, such as one that a full disk or a crash cut short.

        Empty if the file is not there.

        Args:
            about: a text that a record's line must hold; the others are not even read as JSON.
        """
        lines = self.metrics.read_bytes().splitlines() if self.metrics.exists() else []
        wanted = (line for line in lines if about.encode() in line)
        return [record for line in wanted if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
