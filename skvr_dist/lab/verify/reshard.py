"""Save on one layout, resume on another: the same training, to the last bit of state that was loaded."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint, step_folder
from skvr_dist.checkpoint.pieces import MOMENTS
from skvr_dist.checkpoint.saver import Saver
from skvr_dist.config.load import dump_config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.lab.verify.cases import LAYOUTS, Case, batches
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.engine import optimizers
from skvr_dist.parallel.engine.optimizers import state_to_save
from skvr_dist.parallel.mesh import Mesh, new_host_group
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.build import build_engine
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.state import load_state, progress_facts

SAVED_AT, STEPS = 2, 7
"""Steps after which the source saves, and steps of the whole training: five more."""
LOSS_BOUND = 1e-6
"""Largest relative error of the losses after resharding."""
MOMENTS_BOUND = 1e-6
"""Largest relative error of Adam's state after the five steps; all first, or all second, moments are one vector."""
TENSOR_BOUND = 1e-5
"""Largest relative error of any single weight or moment: that of an fp32 gradient between two layouts."""


@dataclass(frozen=True)
class Reshard:
    """One pair of layouts."""

    source: str
    target: str
    loaded_exactly: bool
    """Whether the target, saved again right after loading, has every tensor bit for bit."""
    loss: float
    """Largest relative error of the five losses against the source's own."""
    moments: float
    """Relative error of Adam's moments after the five steps, the larger of the first and the second ones'."""
    tensor: float
    """Largest relative error of any single weight or moment after the five steps."""
    read: float
    """Bytes of tensors that all ranks together read to load it, over those that the checkpoint has."""

    @property
    def missed(self) -> bool:
        """Whether the pair is out of bounds."""
        within = self.loss <= LOSS_BOUND and self.moments <= MOMENTS_BOUND and self.tensor <= TENSOR_BOUND
        return not (self.loaded_exactly and within)


def case_of(layout: str) -> Case:
    """The training that is resharded: tied embeddings, so that ties made and cut are among the pairs.

    The usual initial weights: larger ones amplify the rounding of fp32.
    """
    return Case(layout, "uniform", tied=True, steps=STEPS, initializer_range=0.02)


def reshard(layouts: Sequence[str], folder: Path) -> Iterator[Reshard]:
    """Every layout to every layout; checkpoints are written under `folder`."""
    straight = {}
    for source in layouts:
        ranks = LAYOUTS[source].ranks
        straight[source] = run_ranks(ranks, _train_through, case_of(source), str(folder / source))[0]
    for target in layouts:
        sources = [(source, str(folder / source), str(folder / f"{source} to {target}")) for source in layouts]
        resumed = run_ranks(LAYOUTS[target].ranks, _resume_each, case_of(target), sources, seconds=300.0)[0]
        for (source, saved, again), (losses, read) in zip(sources, resumed, strict=True):
            wanted = straight[source]
            moments, tensor = _errors(Path(saved), Path(again), STEPS)
            yield Reshard(
                source,
                target,
                loaded_exactly=_errors(Path(saved), Path(again), SAVED_AT) == (0.0, 0.0),
                loss=max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
                moments=moments,
                tensor=tensor,
                read=read,
            )


def as_table(outcomes: Iterable[Reshard]) -> str:
    """A line per pair, in Markdown."""
    rows = [
        [
            outcome.source,
            outcome.target,
            "yes" if outcome.loaded_exactly else "NO",
            f"{outcome.loss:.0e}",
            f"{outcome.moments:.0e}",
            f"{outcome.tensor:.0e}",
            f"{outcome.read:.2f}",
            "MISSED" if outcome.missed else "ok",
        ]
        for outcome in outcomes
    ]
    header = [
        "saved by",
        "continued by",
        "loaded bit for bit",
        "loss",
        "moments",
        "worst tensor",
        "bytes read",
        "verdict",
    ]
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def _train_through(case: Case, folder: str) -> list[float]:
    """Train on the source layout, saving on the way and at the end; returns the losses in between."""
    trainer = Trainer(case, folder)
    trainer.train(range(SAVED_AT))
    trainer.save(SAVED_AT)
    losses = trainer.train(range(SAVED_AT, STEPS))
    trainer.save(STEPS)
    return losses


def _resume_each(case: Case, sources: list[tuple[str, str, str]]) -> list[tuple[list[float], float]]:
    """On the target layout, load each source's checkpoint, save it again at once, and train to the end."""
    optimizers.BYTES_OF_A_TURN = 1 << 12  # so that a small model is read in several turns, as a large one is
    found = []
    for _, saved, again in sources:
        trainer = Trainer(case, again)
        read = trainer.load(checkpoint_of(saved, SAVED_AT))
        trainer.save(SAVED_AT)
        found.append((trainer.train(range(SAVED_AT, STEPS)), read))
        trainer.save(STEPS)
        trainer.engine.destroy()
        gc.collect()
    return found


class Trainer:
    """An engine with its checkpoints, in the folder of a run."""

    def __init__(self, case: Case, folder: str) -> None:
        self.config = case.config()
        self.mesh = Mesh.build(self.config.parallel, self.config.model)
        self.engine = build_engine(self.config, self.mesh)
        keep: dict[str, Any] = {"keep_last": 2, "keep_every_steps": None}
        checkpoints, group = RunFolder(folder).checkpoints, new_host_group()
        self.saver = Saver(checkpoints, group, config_text=dump_config(self.config), files={}, **keep)

    def train(self, steps: range) -> list[float]:
        """Train the given steps, counted from 0; returns their losses."""
        mesh, tokens = self.mesh, batches(STEPS)
        mine = [map(MicroBatch.of, tokens[step][mesh.dp_rank :: mesh.dp_size]) for step in steps]
        return [self.engine.train_step(b, plan_of_step(self.config, step)) for b, step in zip(mine, steps, strict=True)]

    def load(self, folder: Path) -> float:
        """Load a checkpoint; returns the bytes of tensors that all ranks read for it, over those that it has."""
        checkpoint = Checkpoint(folder)
        load_state(self.engine, checkpoint)
        (read,) = self.mesh.host_group.sum([float(checkpoint.index.bytes_read)])
        return read / sum(stored.length for stored in checkpoint.index.stored.values())

    def save(self, step: int) -> None:
        """Write the checkpoint of a step and wait until it is published; collective."""
        self.saver.save(state_to_save(self.engine), progress_facts(self.engine, step, tokens_seen=0), lambda _: None)
        self.saver.finish()
        dist.barrier()


def checkpoint_of(run: str | Path, step: int) -> Path:
    """Where a trainer saved a step."""
    return RunFolder(run).checkpoints / step_folder(step)


def _errors(one: Path, other: Path, step: int) -> tuple[float, float]:
    """Relative errors between two checkpoints of a step: of Adam's moments, and of the worst tensor."""
    a, b = (Checkpoint(checkpoint_of(folder, step), verify=True).index for folder in (one, other))
    assert a.names() == b.names(), "the checkpoints hold different tensors"
    worst, squares = 0.0, {kind: [0.0, 0.0] for kind in MOMENTS}
    for name in a.names():
        wanted, found = a.read(name), b.read(name)
        difference, size = float((found - wanted).norm()), float(wanted.norm())
        worst = max(worst, difference / size if difference else 0.0)
        if name.split(".", 1)[0] in squares:
            total = squares[name.split(".", 1)[0]]
            total[0] += difference**2
            total[1] += size**2
    return max(math.sqrt(difference / size) for difference, size in squares.values()), worst
