"""The part of `skvr-plan-cache` that holds a plan against KVSharer's choice (`skvr_dist.evaluate.kvsharer`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import share
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.evaluate.intervals import Interval
    from skvr_dist.evaluate.kvsharer import SharedProfile

_THRESHOLD = 0.5


def add_kvsharer(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument(
        "--kvsharer",
        nargs="?",
        type=share,
        const=_THRESHOLD,
        metavar="T",
        help=f"compare with KVSharer's search, of similarities above T (default: {_THRESHOLD})",
    )


def require_comparable(options: argparse.Namespace) -> None:
    """Refuse what KVSharer does not know, before anything is measured."""
    if options.kvsharer is not None and options.keep != (0,):
        kept = ",".join(map(str, options.keep))
        raise UserError(f"--keep {kept}: KVSharer knows only layer 0 that must keep its cache; leave out --kvsharer")


def as_table(shared: Sequence[SharedProfile], test: str, threshold: float) -> str:
    """What KVSharer costs on one test text, by profile, and what the plan saves against it."""
    rows = []
    for each in shared:
        row = [each.profile, each.calibration, f"{each.size}", ",".join(map(str, each.retained))]
        if each.donors is None:
            row += [f"none with a similarity above {threshold:g}", "", "", ""]
        else:
            row += [_readers(each.donors), f"{each.similarity:.3f}", _signed(each.rise[test]), _signed(each.gain[test])]
        rows.append(row)
    headers = ["profile", "searched on", "layers", "that the plan keeps", "KVSharer: layer>its donor", "similarity"]
    headers += ["its rise over full", "the plan saves"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return f"Beside KVSharer (arXiv 2410.18517), tested on {test}\n\n{table}"


def _readers(donors: Sequence[int]) -> str:
    """The layers that read another one, such as 5>1, 7>1."""
    return ", ".join(f"{layer}>{donor}" for layer, donor in enumerate(donors) if layer != donor) or "no layer shares"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.4f} ({interval.low:+.4f} to {interval.high:+.4f})"
