"""The experiment file: its keys, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from skvr_dist.config.load import read_tree, sentences
from skvr_dist.config.presets import find_config
from skvr_dist.errors import UserError
from skvr_dist.section import Section


class Branch(Section):
    """A run that goes on from a checkpoint of another run of the experiment, in a folder of its own."""

    trunk: str = Field(min_length=1)
    """Name of a run, or of a branch above this one; with several seeds each branches off the trunk of its own seed."""
    step: int = Field(gt=0, le=10**9)
    """The trunk's checkpoint to go on from; the trunk must keep it (`checkpoint.keep_every_steps`)."""
    overrides: list[str] = Field(default=[])
    """What the branch changes, `section.key=value`, over all that its trunk has."""


class Place(Section):
    """Where the runs run."""

    kind: Literal["local", "slurm", "print"] = "local"
    """This machine, jobs of Slurm (through submitit), or nowhere: `print` shows the commands."""
    ranks: int = Field(default=1, gt=0, le=10**5)
    """Ranks of each run; a run is on one host."""
    at_once: int | None = Field(default=None, gt=0, le=10**4)
    """Runs at a time; null: as many as there are GPUs or cores for their ranks, and with Slurm all. More share GPUs."""
    retries: int = Field(default=3, ge=0, le=10**4)
    """How often a run that ended with exit code 75 is started again without a new checkpoint between."""
    slurm: dict[str, Any] = Field(default={})
    """Parameters of submitit's executor: `timeout_min`, `slurm_partition`, `gpus_per_node`, `cpus_per_task` ..."""


class Experiment(Section):
    """A set of runs: each of `runs` with each combination of `grid` and each seed, and the branches off them."""

    output_dir: str = Field(min_length=1)
    """Folder of the experiment; each run has a folder of its own in it."""
    base: list[str] = Field(min_length=1)
    """Configurations that all runs begin with, later ones over earlier ones: files (looked for beside the experiment
    file first) or names of presets."""
    overrides: list[str] = Field(default=[])
    """`section.key=value`, of all runs."""
    runs: dict[str, list[str]] = Field(default={})
    """Named runs and what each changes."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values by `section.key`; every combination is a run."""
    seeds: list[int] = Field(default=[])
    """Values of train.seed; every run is done with each. None: that of the configuration."""
    branches: dict[str, Branch] = Field(default={})
    """Named runs that go on from another one's checkpoint."""
    place: Place = Place()


def read_experiment(file: Path) -> Experiment:
    """Read an experiment file; the names in `base` become paths of files.

    Raises:
        UserError: it cannot be read, a key is unknown or a value impossible.
    """
    tree = read_tree(file)
    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"experiment {file}: {'; '.join(sentences(error.errors(), Experiment))}") from None
    return experiment.model_copy(update={"base": [str(path) for path in _base_files(experiment.base, file.parent)]})


def _base_files(names: Sequence[str], folder: Path) -> list[Path]:
    return [beside if (beside := folder / name).is_file() else find_config(name) for name in names]


_OF_THE_LENGTH = (
    *("train.steps", "train.schedule_steps", "train.warmup_steps", "evaluate.every_steps"),
    *("checkpoint.every_steps", "checkpoint.keep_every_steps"),
)
"""Keys that belong to the length of a run."""


def shortened(experiment: Experiment, steps: int) -> Experiment:
    """The same runs, of a few steps each: to try a file out before it takes a cluster.

    Every step is saved. A decay takes the last two steps, and a branch begins before them (one off another branch a
    step later). A grid over the length of runs stays what it is.

    Args:
        steps: at least 4, for a warm-up, a level step and a decay.
    """
    length = [f"train.steps={steps}", "train.warmup_steps=1", f"evaluate.every_steps={steps}"]
    length += ["checkpoint.every_steps=1", "checkpoint.keep_every_steps=1"]
    branches: dict[str, Branch] = {}
    for name, branch in experiment.branches.items():
        step = branches[branch.trunk].step + 1 if branch.trunk in branches else steps - 2
        branches[name] = branch.model_copy(update={"step": step, "overrides": _without_length(branch.overrides)})
    return experiment.model_copy(
        update={
            "overrides": [*_without_length(experiment.overrides), *length],
            "runs": {name: _without_length(overrides) for name, overrides in experiment.runs.items()},
            "branches": branches,
        }
    )


def _without_length(overrides: Sequence[str]) -> list[str]:
    kept = [each for each in overrides if each.partition("=")[0] not in _OF_THE_LENGTH]
    decay = "train.decay_steps="
    return [f"{decay}2" if each.startswith(decay) and each != f"{decay}null" else each for each in kept]
