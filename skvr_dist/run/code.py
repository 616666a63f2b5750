"""What code runs here: a digest of the package's own files, which all hosts of a run must have alike."""

from __future__ import annotations

import hashlib
from pathlib import Path

import skvr_dist

_LETTERS = 12


def code_digest() -> str:
    """A digest over names and contents of all Python files of the package."""
    root = Path(skvr_dist.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:_LETTERS]
