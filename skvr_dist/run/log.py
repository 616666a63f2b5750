"""The log of each rank, and what the run was made with."""

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

from skvr_dist import __version__
from skvr_dist.files import naming_failure, write_whole

_PACKAGES = ("torch", "deepspeed", "transformers", "webdataset", "sentencepiece", "numpy")


class _LogFile(logging.FileHandler):
    """A log file. What it cannot take, because the disk is full, is lost: a run does not end for that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say the first failure in a sentence; logging would print a traceback for each."""
        error = sys.exc_info()[1]
        if not self._has_failed and isinstance(error, OSError):
            self._has_failed = True
            print(f"cannot write {self.baseFilename}: {error.strerror}; it lacks lines", file=sys.stderr, flush=True)
        elif not isinstance(error, OSError):  # a mistake of ours in a message
            super().handleError(record)


def start_log(file: Path, level: int = logging.INFO) -> logging.Logger:
    """This rank's log file, in a folder that is made; what DeepSpeed logs and Python warns of goes there too.

    Only DeepSpeed's warnings still reach the console.

    Args:
        level: the least that is noted.

    Raises:
        UserError: it cannot be written.
    """
    with naming_failure(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(file, encoding="utf-8", errors="backslashreplace")
        handler.setLevel(level)
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
def prints_to(file: Path) -> Iterator[None]:
    """Send what libraries print, rather than log, to a rank's log file."""
    with file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield


def software_versions() -> dict[str, str]:
    """Versions of Python, of this project (installed, or a checkout on PYTHONPATH) and of what results depend on."""
    ours = {"python": platform.python_version(), "skvr-dist": __version__}
    return ours | {name: version(name) for name in _PACKAGES}


def write_versions(file: Path, layout: dict[str, Any]) -> None:
    """Note the software, the command line and the layout of a run; on one rank."""
    record = {**software_versions(), "command": sys.argv, "layout": layout}
    write_whole(file, json.dumps(record, indent=2) + "\n")
