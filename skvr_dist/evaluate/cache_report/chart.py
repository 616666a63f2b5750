"""Charts as SVG that stands in a page and scales with it; drawn for the width of a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from skvr_dist.evaluate.retention import RetentionPoint, percent

_WIDTH, _HEIGHT = 360, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 12, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""That people with any colour vision tell apart (Okabe and Ito)."""
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def quality_chart(families: Mapping[str, Sequence[RetentionPoint]], most_rise: float) -> str:
    """Rise of the loss against cache bytes, on an axis of square roots.

    Points with their intervals; a line per family, through the best of each size.
    """
    points = [point for of in families.values() for point in of]
    most_bytes = max(point.cache_bytes_per_token for point in points)
    top = max(most_rise, *(point.rise.high for point in points if point.rise))

    def x(value: float) -> float:
        return _LEFT + value / most_bytes * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - math.sqrt(max(0.0, value) / top) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _axes(points, top, x, y)
    dashed = f'y1="{y(most_rise):.1f}" y2="{y(most_rise):.1f}"'
    parts.append(f'<line class="most" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {dashed}/>')
    for colour, of in zip(_cycle(len(families)), families.values(), strict=True):
        best = {p.retained: p for p in sorted(of, key=lambda p: (-p.retained, -p.loss))}.values()
        at = " ".join(f"{x(p.cache_bytes_per_token):.1f},{y(p.rise.mean if p.rise else 0):.1f}" for p in best)
        parts.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in of:
            if point.rise:
                place, (mean, low, high) = f"{x(point.cache_bytes_per_token):.1f}", map(y, point.rise)
                interval = f'x1="{place}" x2="{place}" y1="{low:.1f}" y2="{high:.1f}"'
                parts.append(f'<line {interval} stroke="{colour}" stroke-width="3" opacity="0.4"/>')
                name = f"<title>{escape(point.strategy)}: {point.rise.mean:+.4f}</title>"
                parts.append(f'<circle cx="{place}" cy="{mean:.1f}" r="3" fill="{colour}">{name}</circle>')
    return _svg(_HEIGHT, parts, "Rise of the loss against cache bytes per token")


def _axes(points: Sequence[RetentionPoint], top: float, x: Callable[..., float], y: Callable[..., float]) -> list[str]:
    """Lines and their values, where there is room for them."""
    parts = []
    last = math.inf
    for tick in [tick for tick in _TICKS if tick <= top]:
        if last - y(tick) >= 14:
            last = y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{last:.1f}" y2="{last:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{last + 4:.1f}" text-anchor="end">{tick:g}</text>')
    taken, shares = -math.inf, {point.cache_bytes_per_token: point.retention for point in points}
    for size, share in sorted(shares.items()):
        if (at := x(size)) - taken >= 34:
            taken = at
            where = f'x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle"'
            parts.append(f"<text {where}>{percent(share)}</text>")
    caption = f"share of the cache (all: {max(shares):,} bytes per token)"
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{caption}</text>')
    return parts


def bar_chart(bars: Sequence[tuple[str, int]], what: str) -> str:
    """Horizontal bars with their names and values."""
    row, left = 24, 92
    most = max((value for _, value in bars), default=0) or 1
    parts = []
    for number, (name, value) in enumerate(bars):
        top = number * row + 4
        width = value / most * (_WIDTH - left - 62)
        parts.append(f'<text x="{left - 6}" y="{top + 13}" text-anchor="end">{escape(name[:14])}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{row - 8}" fill="{COLOURS[0]}"/>')
        parts.append(f'<text x="{left + width + 5:.1f}" y="{top + 13}">{value:,}</text>')
    return _svg(len(bars) * row + 8, parts, what)


def legend(families: Sequence[str]) -> str:
    """The colour of each family, as HTML."""
    items = [
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(_cycle(len(families)), families, strict=True)
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _cycle(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _svg(height: int, parts: Sequence[str], what: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(what)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
