"""Hold the search for a smaller cache against all sets of layers that there are, on a model that has few.

    skvr-verify search runs/quickstart/routed --calibrate data/stdlib/train

At each size the set that elimination and swaps find must lie within a tenth of the way from the best set to the median
one, elimination must run at most 0.55 of the layers that it would run if it tried every layer each time and shared
nothing, and a curve of several strategies must take at most 1.1 times the share of the layers that its tree has.
CHECKPOINT is as for tools/plan_cache.py, whose search it is.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import Figure, a_path, add_json, at_least, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.lab.verify.search import SearchCheck, SharedTime

_MOST_LAYERS = 14
"""2 ** 13 sets, which take 2 ** 14 layers over the text."""
_WORST_GAP, _WORST_SHARE, _WORST_TIME = 0.1, 0.55, 1.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=a_path)
    parser.add_argument("--calibrate", required=True, metavar="FOLDER", help="the text that sets are measured on")
    parser.add_argument("--sequences", type=at_least(1), default=128, metavar="N", help="of it (default: 128)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--swaps", type=at_least(0), default=3, metavar="N", help="rounds of swaps (default: 3)")
    parser.add_argument("--rounds", type=at_least(1), default=5, metavar="N", help="of timing (default: 5)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Search and compare; returns the exit code.

    Raises:
        UserError: the checkpoint or the text cannot be used, or the model has too many layers.
    """
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.evaluate.curve import DEFAULT_STRATEGIES, HeldOutData
    from skvr_dist.lab.verify.search import check_search, time_shared

    checkpoint = Checkpoint(options.checkpoint)
    layers = checkpoint.model_config.num_hidden_layers
    if layers > _MOST_LAYERS:
        raise UserError(
            f"{options.checkpoint} has {layers} layers and 2^{layers - 1} sets of them, too many to try; give a model "
            f"of {_MOST_LAYERS} layers at most"
        )
    text = HeldOutData.of(checkpoint, options.calibrate)
    text.require_fits(checkpoint)
    batches = text.batches(options.sequences, options.batch_size, "cpu")
    decoder = checkpoint.load_decoder()
    checked = check_search(decoder, batches, options.swaps)
    timed = time_shared(decoder, batches, DEFAULT_STRATEGIES, options.rounds)
    return conclude(
        _figures(checked, timed),
        table=_table(checked),
        record={"checkpoint": str(checkpoint.folder), "search": asdict(checked), "curve": asdict(timed)},
        json_file=options.json,
    )


def _table(checked: SearchCheck) -> str:
    rows = [
        [
            each.size,
            each.sets,
            f"{each.best:.4f}",
            f"{each.median:.4f}",
            f"{each.eliminated:.4f}",
            f"{each.swapped:.4f}",
            f"{each.gap:.1%}",
            ",".join(map(str, each.found)),
            "the same" if each.found == each.wanted else ",".join(map(str, each.wanted)),
        ]
        for each in checked.sizes
    ]
    headers = ["layers", "sets", "best loss", "median", "eliminated", "with swaps", "gap", "found", "best"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _figures(checked: SearchCheck, timed: SharedTime) -> list[Figure]:
    worst = max(checked.sizes, key=lambda each: each.gap)
    ran, of = checked.evaluated_layers, checked.layers_of_plain
    over = timed.ratio / timed.share
    low, high = min(timed.ratios), max(timed.ratios)
    return [
        Figure(
            f"worst gap to the best set, at {worst.size} layers: {worst.gap:.1%} of that of the median",
            f"<= {_WORST_GAP:.0%}",
            worst.gap <= _WORST_GAP,
        ),
        Figure(
            f"elimination ran {ran} layers, plain elimination {of}: {checked.share:.3f}",
            f"<= {_WORST_SHARE}",
            checked.share <= _WORST_SHARE,
        ),
        Figure(
            f"{' '.join(timed.strategies)} at once: {timed.together_layers} layers of {timed.alone_layers}, "
            f"{timed.ratio:.3f} of the time ({low:.3f} to {high:.3f}), {over:.2f} x the share of {timed.share:.3f}",
            f"<= {_WORST_TIME} x",
            over <= _WORST_TIME,
        ),
    ]
