"""A figure as data, its picture and its table.

Colours are those of Okabe and Ito (2008), which colour-blind people tell apart; each line also has a marker and a dash
pattern of its own.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from skvr_dist.files import as_json, write_whole

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
Kind = Literal["points", "marks", "band", "fit"]
_APART = 0.006
"""By how much of the axis two methods at one place stand apart, so that their intervals can be seen."""


@dataclass
class Series:
    """A line of a panel."""

    label: str
    x: list[float]
    y: list[float]
    half: list[float | None]
    """Half of the 95 % interval of each y; None where there is none."""
    kind: Kind = "points"
    """Points with bars and a line, such points alone, a line with a band, or a line without points."""
    style: int = 0
    """Number of its colour, marker and dashes: the same for one method in all panels."""


@dataclass
class Panel:
    """A coordinate system of a figure."""

    title: str
    x_label: str
    y_label: str
    series: list[Series] = field(default_factory=list)
    sizes_x: bool = False
    """Whether x are sizes, over which the axis is logarithmic."""
    percent_x: bool = False
    """Whether x are few percentages, all of which are ticks."""


@dataclass
class Figure:
    """One picture and the table behind it."""

    name: str
    title: str
    panels: list[Panel]
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    """Sentences below the table: what is meant, what is left out."""

    def markdown(self, picture: str) -> str:
        """The page of the figure."""
        table = tabulate(self.rows, headers=self.header, tablefmt="github", disable_numparse=True)
        return "\n".join([f"# {self.title}", "", f"![{self.title}]({picture})", "", table, "", *self.notes, ""])

    def write(self, folder: Path, form: str) -> list[Path]:
        """Write picture, page and JSON into a folder.

        Args:
            form: `png` or `svg`.

        Raises:
            UserError: one cannot be written.
        """
        picture, page, record = (folder / f"{self.name}.{suffix}" for suffix in (form, "md", "json"))
        write_whole(picture, _drawn(self, form))
        write_whole(page, self.markdown(picture.name))
        write_whole(record, as_json(asdict(self), indent=1) + "\n")
        return [picture, page, record]


def _drawn(figure: Figure, form: str) -> bytes:
    """The picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(figure.panels), 2 if len(figure.panels) <= _IN_TWO_COLUMNS else 3)
    rows = -(-len(figure.panels) // columns)
    width, height = (7.5, 4.6) if columns == 1 else (1.5 + 5 * columns, 4.2 * rows + 0.6)
    with matplotlib.rc_context({"svg.hashsalt": figure.name, "svg.fonttype": "none", "font.size": 10}):
        drawn, grid = plt.subplots(rows, columns, figsize=(width, height), dpi=150, squeeze=False, facecolor="white")
        axes = list(grid.flat)
        for panel, place in zip(figure.panels, axes, strict=False):
            _draw_panel(panel, place)
        for place in axes[len(figure.panels) :]:
            place.set_visible(False)
        drawn.suptitle(figure.title, fontsize=12)
        _draw_legend(drawn, axes)
        picture = io.BytesIO()
        drawn.savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None, bbox_inches="tight")
        plt.close(drawn)
    return picture.getvalue()


_IN_TWO_COLUMNS = 4


def _draw_panel(panel: Panel, axes: Any) -> None:
    places = sorted({x for series in panel.series for x in series.x})
    apart = _APART * (places[-1] - places[0])
    of_points = [series.style for series in panel.series if series.kind == "points"]
    for series in panel.series:
        look = {
            "color": _COLOURS[series.style % len(_COLOURS)],
            "linestyle": _DASHES[series.style // 2 % len(_DASHES)],
            "linewidth": 1.6,
        }
        marker = _MARKERS[series.style % len(_MARKERS)]
        halves = [half or 0.0 for half in series.half]
        bars = halves if any(series.half) else None
        if series.kind == "fit":
            axes.plot(series.x, series.y, **{**look, "linewidth": 1.2})
        elif series.kind == "band":
            axes.plot(series.x, series.y, marker=marker, markersize=4, label=series.label, **look)
            low, high = ([y + sign * half for y, half in zip(series.y, halves, strict=True)] for sign in (-1, 1))
            axes.fill_between(series.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        else:
            x = series.x
            if series.kind == "marks":
                look["linestyle"] = "none"
            else:
                shift = apart * (of_points.index(series.style) - (len(of_points) - 1) / 2)
                x = [place + shift for place in x]
            axes.errorbar(x, series.y, yerr=bars, marker=marker, markersize=6, capsize=3, label=series.label, **look)
    axes.set_title(panel.title, fontsize=10.5)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.sizes_x:
        axes.set_xscale("log")
        places = sorted({x for series in panel.series if series.kind == "marks" for x in series.x})
        axes.set_xticks(places, [f"{place / 1e6:.3g} M" for place in places])
        axes.set_xticks([], minor=True)
    if panel.percent_x:
        axes.set_xticks(places, [f"{place:.3g}" for place in places])


def _draw_legend(drawn: Any, axes: Sequence[Any]) -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for place in axes:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    drawn.tight_layout()
    drawn.legend(
        handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False
    )
