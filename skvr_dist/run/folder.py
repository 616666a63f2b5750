"""The folder of a run: everything it writes lies in here.

run.json          the run's id, and what it was last told to go on from
lock/             who writes here (`skvr_dist.run.lock`)
config.yaml       the resolved configuration
versions.json     the software, the command and the layout
metrics.jsonl     one record per logged step or evaluation
logs/             one file per rank, DeepSpeed's messages among it
tensorboard/
checkpoints/
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.files import write_whole

RUN_FILE = "run.json"
_PACKAGES = ("skvr-dist", "torch", "deepspeed", "transformers", "webdataset", "sentencepiece", "numpy")


class RunFolder:
    """Paths and small files of one run; rank 0 writes what is the same for all ranks."""

    def __init__(self, config: Config, rank: int) -> None:
        self.path = Path(config.train.output_dir)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.logs = self.path / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self._log_file = self.logs / f"rank-{rank:05d}.log"
        if rank == 0:
            (self.path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_versions(self, layout: dict[str, Any]) -> None:
        record = {**software_versions(), "command": sys.argv, "layout": layout}
        (self.path / "versions.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def start_log(self) -> logging.Logger:
        """This rank's log file; what DeepSpeed logs and Python warns of goes there too.

        Only DeepSpeed's warnings still reach the console.
        """
        handler = logging.FileHandler(self._log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("skvr_dist")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(handler)
        deepspeed_logger = logging.getLogger("DeepSpeed")
        for console in deepspeed_logger.handlers:
            console.setLevel(logging.WARNING)
        deepspeed_logger.addHandler(handler)
        return logger

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Send what libraries print, rather than log, to this rank's log file."""
        with self._log_file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield


def wait_for_run_id(output: Path, seconds: float) -> str:
    """The id that a folder's run keeps, however often it is started; on ranks other than the first, which makes it.

    Raises:
        UserError: it does not appear.
    """
    deadline = time.monotonic() + seconds
    while not (known := read_run(output).get("id")):
        if time.monotonic() > deadline:
            raise UserError(
                f"host {socket.gethostname()} sees no {output / RUN_FILE} of rank 0 after {seconds:.0f} s; give a "
                f"train.output_dir on a file system that all hosts share"
            )
        time.sleep(0.1)
    return str(known)


def read_run(output: Path) -> dict[str, Any]:
    """What `write_run` noted of a run; empty if there is nothing."""
    try:
        noted: dict[str, Any] = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{output / RUN_FILE} is damaged ({error}); remove it") from None
    return noted


def write_run(output: Path, **facts: Any) -> None:
    """Note facts of a run, beside those that are noted already; on one rank."""
    known = read_run(output)
    if facts.items() <= known.items():
        return
    write_whole(output / RUN_FILE, json.dumps({**known, **facts}, indent=2) + "\n")


def software_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
