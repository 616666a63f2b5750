"""The folder that an export or import makes: filled beside its place, and there only when it is whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skvr_dist.errors import UserError


def require_free(output: Path) -> None:
    """Raises `UserError` unless `output` is missing or an empty folder."""
    output = output.absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists and is not an empty folder; choose another one, or remove it first")


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """An empty folder of the same name to fill, which becomes `output` at the end, and vanishes if anything is raised.

    It is in a temporary folder beside `output`, so that the rename stays within one file system.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.partial-", dir=output.parent) as temporary:
        folder = Path(temporary) / output.name
        folder.mkdir()
        yield folder
        folder.replace(output)
