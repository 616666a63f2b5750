"""The folder of a run: everything it writes lies in here.

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
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skvr_dist.train.config import Config

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


def software_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
