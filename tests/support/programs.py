"""Programs of the project, run in the process of the tests."""

from __future__ import annotations

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_here(program: str, *arguments: str, code: int = 0) -> str:
    """Run a program such as `tools/report.py` from the project's root, to that exit code; returns what it printed.

    This process has imported what a new one would import for 2 to 5 s. How real processes end is tested in
    `tests/commands/test_command.py`, and that installed programs find what they import in `test_wheel.py` beside it.
    """
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [program, *arguments])
        patch.chdir(ROOT)
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    assert (ended.value.code or 0) == code, printed.getvalue()
    return printed.getvalue()
