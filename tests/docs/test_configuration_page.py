"""docs/configuration.md is what the sections say, and they say something of every key."""

from __future__ import annotations

from pathlib import Path

from skvr_dist.config.page import as_page

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_page(), "run `make docs`"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in as_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 70
    assert [row for row in rows if row.endswith("|  |")] == []
