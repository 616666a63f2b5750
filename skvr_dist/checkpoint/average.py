"""The average of the last checkpoints of a run, as a checkpoint of weights alone.

Averaging weights along a training does what a decay of the learning rate would (arXiv 1803.05407, arXiv 2306.03241), so
it shows what a run at a level rate is worth before it decays.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from skvr_dist.checkpoint.facts import AverageFacts
from skvr_dist.checkpoint.folder import Checkpoint, candidates, copy_small_files, partial_folder, publish, step_folder
from skvr_dist.checkpoint.pieces import WEIGHTS, LazyPiece, Pieces
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.errors import UserError
from skvr_dist.files import prove_new_folder, published
from skvr_dist.run.folder import RunFolder


def last_checkpoints(run: Path, count: int) -> list[Checkpoint]:
    """The last checkpoints of a run, the oldest first.

    Raises:
        UserError: it has fewer, one is damaged, or they are not of one model.
    """
    found = candidates(RunFolder(run).checkpoints)
    if not found:
        raise UserError(f"{run} is not the folder of a run that saved checkpoints; give a run's train.output_dir")
    if len(found) < count:
        raise UserError(
            f"{run} has {len(found)} checkpoints, but {count} are to be averaged; use fewer, or keep more with "
            f"checkpoint.keep_last"
        )
    checkpoints = [Checkpoint(path) for path in reversed(found[:count])]
    newest = checkpoints[-1]
    for checkpoint in checkpoints:
        if _shapes(checkpoint) != _shapes(newest):
            raise UserError(f"{checkpoint.folder} and {newest.folder} hold other weights; average those of one model")
    return checkpoints


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: checkpoint.index.shape(WEIGHTS + name) for name in checkpoint.weight_names()}


def shares(count: int, decay: float | None) -> list[float]:
    """What each checkpoint counts for, the oldest first; they add up to 1.

    Args:
        decay: what a checkpoint counts for relative to the next newer one; None counts all alike.
    """
    powers = [(1.0 if decay is None else decay) ** age for age in reversed(range(count))]
    return [power / sum(powers) for power in powers]


def write_average(checkpoints: Sequence[Checkpoint], decay: float | None, output: Path) -> Path:
    """Write the average of checkpoints, the oldest first, to a folder as that of a run; returns the checkpoint's.

    It has the newest one's step, configuration and tokenizer. One weight at a time is in memory, in float64.

    Raises:
        UserError: `output` holds something or cannot be written; or a checkpoint is damaged.
    """
    output = prove_new_folder(output)
    newest, counts = checkpoints[-1], shares(len(checkpoints), decay)
    pieces: Pieces = {}
    for name, shape in _shapes(newest).items():
        like = torch.empty(shape, dtype=newest.index.dtype(WEIGHTS + name), device="meta")
        average = functools.partial(_average, checkpoints, counts, name)
        pieces[WEIGHTS + name] = [LazyPiece(shape, (0,) * len(shape), like, average)]
    averaged = AverageFacts(steps=[checkpoint.step for checkpoint in checkpoints], shares=counts)
    facts = newest.facts.model_copy(
        update={"averaged": averaged, "adam_steps": None, "guard": None, "evaluation_due": None}
    )
    with published(output) as run:
        folder = RunFolder(run).checkpoints
        partial, final = folder / partial_folder(newest.step), folder / step_folder(newest.step)
        partial.mkdir(parents=True)
        copy_small_files(newest, partial, facts)
        publish(partial, final, write_pieces(partial, pieces))
    return RunFolder(output).checkpoints / step_folder(newest.step)


def _average(checkpoints: Sequence[Checkpoint], counts: Sequence[float], name: str) -> Tensor:
    """One weight, averaged in float64 and rounded to what the newest checkpoint stores it in."""
    total = torch.zeros(checkpoints[-1].index.shape(WEIGHTS + name), dtype=torch.float64)
    for checkpoint, share in zip(checkpoints, counts, strict=True):
        total.add_(checkpoint.stored_weight(name).double(), alpha=share)
    return total.to(checkpoints[-1].index.dtype(WEIGHTS + name))
