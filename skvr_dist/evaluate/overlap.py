"""Whether one text is inside another: a set that was searched on a text says nothing when it is tested on the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from skvr_dist.data.batch import MicroBatch

_WINDOW = 32
"""Tokens that are looked for as one: longer than what licences and boilerplate repeat by chance."""


def shared_share(searched: Sequence[MicroBatch], tested: Sequence[MicroBatch]) -> float:
    """Share of the windows of one text, end to end, that stand somewhere in the other."""
    there = {window for row in _rows(tested) for window in _windows(row, step=1)}
    wanted = [window for row in _rows(searched) for window in _windows(row, step=_WINDOW)]
    return sum(window in there for window in wanted) / max(1, len(wanted))


def _rows(batches: Sequence[MicroBatch]) -> Iterator[list[int]]:
    for batch in batches:
        yield from batch.tokens.tolist()


def _windows(row: list[int], step: int) -> Iterator[tuple[int, ...]]:
    window = min(_WINDOW, len(row))
    for start in range(0, len(row) - window + 1, step):
        yield tuple(row[start : start + window])
