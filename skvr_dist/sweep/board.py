"""What a sweep shows while it runs: a table that is drawn anew on a terminal, and lines elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from skvr_dist.sweep.loop import State, Status

_ORDER: tuple[State, ...] = ("running", "failed", "waiting", "finished")
_SECONDS_BETWEEN = 2.0
_TAIL_BYTES = 1 << 14


class Board:
    """Shows the runs of a sweep on stdout."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._drawn_at, self._drawn_lines = 0.0, 0
        self._said: dict[str, str] = {}

    def show(self, statuses: Sequence[Status]) -> None:
        """Show where the runs are: every few seconds on a terminal, elsewhere a line for each change."""
        if not self._is_terminal:
            self._say_changes(statuses)
        elif time.monotonic() - self._drawn_at > _SECONDS_BETWEEN:
            self._draw(statuses)

    def close(self, statuses: Sequence[Status]) -> None:
        """Show how it ended, whole."""
        if self._is_terminal:
            self._erase()
        print(table(statuses), flush=True)

    def _say_changes(self, statuses: Sequence[Status]) -> None:
        for status in statuses:
            name, state = status.run.name, status.state
            if self._said.get(name, "waiting") != state:
                again = " again" if state == "running" and status.saved else ""
                print(f"{name}: {state}{again}" + (f", {status.error}" if status.error else ""), flush=True)
            self._said[name] = state

    def _draw(self, statuses: Sequence[Status]) -> None:
        """The table, or as much of it as the terminal holds: what runs first."""
        width, height = shutil.get_terminal_size()
        lines = table(sorted(statuses, key=lambda status: _ORDER.index(status.state))).splitlines()
        counts = Counter(status.state for status in statuses)
        lines = [*lines[: max(3, height - 2)], ", ".join(f"{counts[state]} {state}" for state in _ORDER)]
        self._erase()
        print("\n".join(line[: width - 1] for line in lines), flush=True)
        self._drawn_at, self._drawn_lines = time.monotonic(), len(lines)

    def _erase(self) -> None:
        if self._drawn_lines:
            print(f"\x1b[{self._drawn_lines}A\x1b[J", end="")
            self._drawn_lines = 0


def table(statuses: Sequence[Status]) -> str:
    """A row per run: its state, its steps, its last loss and its last held-out losses."""
    rows = []
    for status in statuses:
        last = _last_records(status.run.folder.metrics)
        losses = "  ".join(f"{key.rpartition('/')[2]} {value:.4f}" for key, value in last.items() if "evaluate/" in key)
        step, steps = last.get("step", 0), status.run.config.train.steps
        loss = last.get("train/loss")
        rows.append([status.run.name, status.state, f"{step}/{steps}", "" if loss is None else f"{loss:.4f}", losses])
    headers = ["run", "state", "step", "loss", "held-out loss"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _last_records(metrics: Path) -> dict[str, Any]:
    """The newest value of each key, from the end of metrics.jsonl."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines(keepends=True)
    newest: dict[str, Any] = {}
    for line in lines:
        if line.startswith(b'{"step"') and line.endswith(b"\n"):  # the first may begin in the middle
            newest |= json.loads(line)
    return newest
