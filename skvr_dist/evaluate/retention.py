"""The retention curve: what the loss becomes when fewer layers keep a cache."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.evaluate.intervals import Bootstrap, Interval
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.files import write_whole
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

RETENTION_FILE = "retention.json"
"""File in a checkpoint's folder that holds its measured curve."""
CACHE_BYTES_PER_ELEMENT = 2
"""Caches are counted in bf16, as they are served."""
_STRETCHES = 8  # of a sequence, for the loss by position


@dataclass(frozen=True)
class RetentionPoint:
    """The loss at one cache strategy."""

    strategy: str
    retained: int
    """Layers that keep a cache."""
    retention: float
    cache_bytes_per_token: int
    loss: float
    """Nats per token."""
    rise: Interval | None = None
    """Over the first strategy's loss, in nats per token."""
    loss_by_position: list[float] = field(default_factory=list)
    """Of eight equal stretches of the sequence, from its beginning."""


def retention_curve(
    decoder: Decoder, batches: Sequence[MicroBatch], strategies: Mapping[str, CacheStrategy]
) -> list[RetentionPoint]:
    """Mean loss over the labels of all batches, at each strategy; layers that strategies have in common run once.

    Args:
        batches: of one sequence length.

    Returns:
        one point per strategy, in the order given; the first is what the others' rise is measured against.
    """
    losses = PrefixTree(decoder, batches).token_losses(list(strategies.values()))
    bootstrap, counted = Bootstrap(batches), torch.cat([batch.labels.cpu() != IGNORED for batch in batches])
    return [
        RetentionPoint(
            strategy=name,
            retained=len(strategy.retained),
            retention=strategy.retention,
            cache_bytes_per_token=strategy.cache_bytes_per_token(
                kv_heads=decoder.config.num_key_value_heads,
                head_dim=decoder.config.head_dim,
                bytes_per_element=CACHE_BYTES_PER_ELEMENT,
            ),
            loss=bootstrap.mean(token_losses).mean,
            rise=bootstrap.mean(token_losses - losses[0]),
            loss_by_position=_by_position(token_losses, counted),
        )
        for (name, strategy), token_losses in zip(strategies.items(), losses, strict=True)
    ]


def _by_position(token_losses: Tensor, counted: Tensor) -> list[float]:
    """Mean losses of equal stretches of the sequence, of token losses [N, S]; not a number where nothing counts."""
    length = token_losses.shape[1]
    cuts = [number * length // _STRETCHES for number in range(_STRETCHES + 1)]
    stretches = [slice(*both) for both in pairwise(cuts) if both[0] < both[1]]
    sums = [(token_losses[:, each].sum(dtype=torch.float64), counted[:, each].sum()) for each in stretches]
    return [float(loss / tokens) for loss, tokens in sums]


def percent(share: float) -> str:
    """A share as a percentage with three digits at most: 12.5%, 50%."""
    return f"{100 * share:.3g}%"


def as_table(curves: Mapping[str, Sequence[RetentionPoint]]) -> str:
    """A table of curves over the same strategies, one column of losses per curve, with the rise over the first row.

    A curve that stands alone has the interval of its rises too (`skvr_dist.evaluate.intervals`).
    """
    first, alone = next(iter(curves.values())), len(curves) == 1
    header = ["strategy", "retention", "cache bytes/token"]
    for label in curves:
        header += [f"{label} loss", "change"]
    rows = []
    for index, point in enumerate(first):
        row = [point.strategy, percent(point.retention), f"{point.cache_bytes_per_token:,}"]
        for points in curves.values():
            loss = points[index].loss
            change = "" if index == 0 else f"{loss - points[0].loss:+.4f}"
            rise = points[index].rise
            if change and alone and rise:
                _, low, high = rise
                change += f" ({low:+.4f} to {high:+.4f})"
            row += [f"{loss:.4f}", change]
        rows.append(row)
    return tabulate(rows, headers=header, tablefmt="github", stralign="right", disable_numparse=True)


def as_records(points: Sequence[RetentionPoint]) -> list[dict[str, Any]]:
    """The points as plain dictionaries."""
    return [asdict(point) for point in points]


def plot(curves: Mapping[str, Sequence[RetentionPoint]], file: Path) -> None:
    """Draw loss against cache bytes per token, one line per curve, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for label, points in curves.items():
        ordered = sorted(points, key=lambda point: point.cache_bytes_per_token)
        axes.plot(
            [point.cache_bytes_per_token for point in ordered], [point.loss for point in ordered], "o-", label=label
        )
    for point in next(iter(curves.values())):
        axes.axvline(point.cache_bytes_per_token, color="0.9", zorder=0)
        axes.annotate(
            percent(point.retention),
            (point.cache_bytes_per_token, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=8,
            color="0.4",
        )
    axes.set_xlabel("cache bytes per token (bf16)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title("What a smaller key/value cache costs", pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(file, picture.getvalue())
    plt.close(figure)
