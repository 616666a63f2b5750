"""What a sweep shows while it runs: a table that is drawn anew on a terminal, and lines elsewhere."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from skvr_dist.sweep.loop import State, Status
from skvr_dist.sweep.results import HELD_OUT

_ORDER: tuple[State, ...] = ("running", "failed", "waiting", "finished")
_SECONDS_BETWEEN = 2.0
_TAIL_BYTES = 1 << 16  # some hundred steps


class Board:
    """Shows the runs of a sweep on stdout."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._drawn_at, self._drawn_lines = 0.0, 0
        self._said: dict[str, str] = {}
        self._newest: dict[Path, tuple[int, dict[str, Any]]] = {}

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
        print(self._table(statuses), flush=True)

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
        lines = self._table(sorted(statuses, key=lambda status: _ORDER.index(status.state))).splitlines()
        counts = Counter(status.state for status in statuses)
        lines = [*lines[: max(3, height - 2)], ", ".join(f"{counts[state]} {state}" for state in _ORDER)]
        self._erase()
        print("\n".join(line[: width - 1] for line in lines), flush=True)
        self._drawn_at, self._drawn_lines = time.monotonic(), len(lines)

    def _erase(self) -> None:
        if self._drawn_lines:
            print(f"\x1b[{self._drawn_lines}A\x1b[J", end="")
            self._drawn_lines = 0

    def _table(self, statuses: Sequence[Status]) -> str:
        """A row per run: its state, its steps, its last loss and its last held-out losses."""
        rows = []
        for status in statuses:
            last = self._last_values(status.run.folder.metrics)
            held_out = {key.removeprefix(HELD_OUT): last[key] for key in last if key.startswith(HELD_OUT)}
            losses = "  ".join(f"{name} {_shown(loss)}" for name, loss in held_out.items())
            loss = _shown(last["train/loss"]) if "train/loss" in last else ""
            step = f"{last.get('step', 0)}/{status.run.config.train.steps}"
            rows.append([status.run.name, status.state, step, loss, losses])
        headers = ["run", "state", "step", "loss", "held-out loss"]
        return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)

    def _last_values(self, metrics: Path) -> dict[str, Any]:
        """The newest value of each key, from the end of metrics.jsonl; read again only if the file has grown."""
        size = metrics.stat().st_size if metrics.exists() else 0
        if self._newest.get(metrics, (0, {}))[0] != size:
            self._newest[metrics] = (size, _newest_values(metrics, size))
        return self._newest.get(metrics, (0, {}))[1]


def _shown(loss: float | None) -> str:
    """A loss; JSON has null for one that is no number."""
    return f"{math.nan if loss is None else loss:.4f}"


def _newest_values(metrics: Path, size: int) -> dict[str, Any]:
    with metrics.open("rb") as file:
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().splitlines(keepends=True)
    newest: dict[str, Any] = {}
    for line in lines:
        if line.startswith(b'{"step"') and line.endswith(b"}\n"):  # the first may begin in the middle
            newest |= json.loads(line)
    return newest
