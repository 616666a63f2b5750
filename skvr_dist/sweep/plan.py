"""The runs of an experiment: names, configurations and the order in which they can begin. Nothing is started here."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skvr_dist.checkpoint.folder import step_folder
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import load_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.files import local_path
from skvr_dist.run.folder import RunFolder
from skvr_dist.sweep.experiment import Branch, Experiment

RESERVED = ("results.jsonl", "sweep.json", "lock", "slurm")
"""What an experiment's folder holds beside its runs."""
DECIDED_HERE = ("train.output_dir", "train.resume")
"""Paths of a run that an experiment gives it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_UNFIT = re.compile(r"[^A-Za-z0-9.+-]+")
_LONGEST_VALUE = 40


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment."""

    name: str
    overrides: tuple[str, ...]
    """What distinguishes it from the other runs, without the seed."""
    config: Config
    trunk: Path | None = None
    """The checkpoint that it begins from, if it is a branch."""
    trunk_name: str | None = None
    """The run of that checkpoint."""

    @property
    def folder(self) -> RunFolder:
        """The folder of the run."""
        return RunFolder(self.config.train.output_dir)

    def is_finished(self) -> bool:
        """Whether the checkpoint of its last step is there, which is written after everything else of the run."""
        return (self.folder.checkpoints / step_folder(self.config.train.steps)).is_dir()

    def can_begin(self) -> bool:
        """Whether the checkpoint that it begins from is there."""
        return self.trunk is None or self.trunk.is_dir()


@dataclass(frozen=True)
class _Draft:
    """A run before its configuration is read."""

    title: str
    """Its name without the seed."""
    seed: int | None
    overrides: tuple[str, ...]
    branch: Branch | None = None

    @property
    def name(self) -> str:
        return _with_seed(self.title, self.seed)


def plan_runs(experiment: Experiment, more: Sequence[str] = ()) -> list[PlannedRun]:
    """All runs of an experiment; a branch comes after its trunk.

    Args:
        more: further overrides of all runs, over all others.

    Raises:
        UserError: there are none, two have one name, a configuration is impossible, or a branch has no trunk.
    """
    _require_own_keys([*experiment.overrides, *more], "overrides")
    drafts = [*_drafts(experiment)]
    drafts += _branches(experiment, drafts)
    if not drafts:
        raise UserError("the experiment has no runs; give it runs, a grid or seeds")
    twice = [name for name, count in Counter(draft.name for draft in drafts).items() if count > 1]
    if twice:
        raise UserError(f"two runs of the experiment are called {twice[0]}; give one another name or value")
    planned: dict[str, PlannedRun] = {}
    for draft in drafts:
        _require_name(draft.name)
        planned[draft.name] = _planned(experiment, draft, more, planned)
    return list(planned.values())


def require_no_axis(experiment: Experiment, more: Sequence[str]) -> None:
    """Refuse overrides of what runs are called by.

    Raises:
        UserError: one is of a key of the grid, or of the seed where the experiment has several.
    """
    axes = {key: f"change grid.{key} in the file" for key in experiment.grid}
    if experiment.seeds:
        axes["train.seed"] = "give --seed"
    for key, (axis, way) in itertools.product(_keys(more), axes.items()):
        if f"{axis}.".startswith(f"{key}.") or f"{key}.".startswith(f"{axis}."):
            raise UserError(f"the command line sets {key}, but {axis} is an axis of the experiment; {way} instead")


def _drafts(experiment: Experiment) -> Iterator[_Draft]:
    """Every run but branches: runs x grid x seeds."""
    for key, values in experiment.grid.items():
        if not values:
            raise UserError(f"grid.{key} of the experiment is empty; give it values, or remove the key")
        _require_own_keys([f"{key}="], "grid")
    if not (experiment.runs or experiment.grid or experiment.seeds):
        return
    for name, overrides in (experiment.runs or {"": []}).items():
        _require_own_keys(overrides, f"runs.{name}")
        for key in [*experiment.grid, *(["train.seed"] if experiment.seeds else [])]:
            if key in _keys(overrides):
                raise UserError(f"runs.{name} of the experiment sets {key}, which has an axis of its own; remove one")
        for point in itertools.product(*experiment.grid.values()):
            chosen = dict(zip(experiment.grid, point, strict=True))
            title = "_".join(part for part in (name, *_value_names(chosen)) if part)
            own = (*overrides, *(f"{key}={_as_yaml(value)}" for key, value in chosen.items()))
            yield from (_Draft(title, seed, own) for seed in _seeds(experiment))


def _branches(experiment: Experiment, trunks: Sequence[_Draft]) -> list[_Draft]:
    """The branches of every seed, with all that their trunks have."""
    titles: dict[str, tuple[str, ...]] = {draft.title: draft.overrides for draft in trunks}
    drafts = []
    for name, branch in experiment.branches.items():
        if branch.trunk not in titles:
            raise UserError(
                f"branches.{name} of the experiment is off {branch.trunk}, which is no run of it or no branch above; "
                f"there are {', '.join(titles) or 'none'}"
            )
        _require_own_keys(branch.overrides, f"branches.{name}")
        if experiment.seeds and "train.seed" in _keys(branch.overrides):
            raise UserError(f"branches.{name} of the experiment sets train.seed, which has an axis; remove one")
        own = (*titles[branch.trunk], *branch.overrides)
        drafts += [_Draft(name, seed, own, branch) for seed in _seeds(experiment)]
        titles[name] = own
    return drafts


def _planned(
    experiment: Experiment, draft: _Draft, more: Sequence[str], earlier: Mapping[str, PlannedRun]
) -> PlannedRun:
    """A run with its configuration."""
    overrides = [*experiment.overrides, *draft.overrides]
    overrides += [] if draft.seed is None else [f"train.seed={draft.seed}"]
    folder = local_path(experiment.output_dir) / draft.name
    overrides += [*more, f"train.output_dir={_as_yaml(str(folder))}"]
    trunk = parent = None
    if draft.branch:
        parent = earlier[_with_seed(draft.branch.trunk, draft.seed)]
        _require_kept(parent, draft.branch.step, draft.name)
        trunk = parent.folder.checkpoints / step_folder(draft.branch.step)
        overrides.append(f"train.resume={_as_yaml(str(trunk))}")
    try:
        config = load_config(experiment.base, overrides)
        data_parallel_size(config, experiment.place.ranks)
    except UserError as error:
        raise UserError(f"run {draft.name} of the experiment: {error}") from None
    if "jsonl" not in config.metrics.writers:
        raise UserError(
            f"run {draft.name} of the experiment has metrics.writers {config.metrics.writers} without jsonl, which its "
            f"results are read from; add it"
        )
    if draft.branch and config.train.steps <= draft.branch.step:
        raise UserError(
            f"run {draft.name} of the experiment branches off step {draft.branch.step}, but its train.steps "
            f"{config.train.steps} is no more; raise it"
        )
    return PlannedRun(draft.name, draft.overrides, config, trunk, parent.name if parent else None)


def _require_kept(trunk: PlannedRun, step: int, branch: str) -> None:
    """Refuse a branch off a checkpoint that its trunk does not write, or deletes while it goes on."""
    saving, last = trunk.config.checkpoint, trunk.config.train.steps
    kept = saving.keep_every_steps and step % saving.keep_every_steps == 0 and step % saving.every_steps == 0
    if step != last and not (kept and step < last):
        often = f"every {saving.keep_every_steps} steps, of those that it saves every {saving.every_steps}, and"
        keeps = f"{often} its last, {last}" if saving.keep_every_steps else f"that of its last step, {last}, alone"
        raise UserError(
            f"run {branch} of the experiment branches off step {step} of {trunk.name}, which keeps {keeps}; set its "
            f"checkpoint.every_steps and checkpoint.keep_every_steps to {step}, or name another step"
        )


def _require_own_keys(overrides: Sequence[str], where: str) -> None:
    for key in _keys(overrides):
        if key in DECIDED_HERE:
            raise UserError(f"{where} of the experiment sets {key}, which the experiment decides; remove it")


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise UserError(
            f"{name!r} cannot be the name of a run, which is that of its folder; use letters, digits and . _ + = - and "
            f"none of {', '.join(RESERVED)}"
        )


def _keys(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0] for override in overrides]


def _seeds(experiment: Experiment) -> Sequence[int | None]:
    return experiment.seeds or [None]


def _with_seed(title: str, seed: int | None) -> str:
    return title if seed is None else "_".join(part for part in (title, f"seed-{seed}") if part)


def _value_names(values: Mapping[str, Any]) -> list[str]:
    """The values of a point of the grid as parts of a name, each with the last part of its key if that is enough."""
    last = Counter(key.rpartition(".")[2] for key in values)
    return [
        f"{short if last[short := key.rpartition('.')[2]] == 1 else key}-{_value_name(value)}"
        for key, value in values.items()
    ]


def _as_yaml(value: Any) -> str:
    """A value as overrides have it: JSON, with letters as they are.

    JSON would write those beyond the first 65,536 as two halves, which YAML does not join.
    """
    return json.dumps(value, ensure_ascii=False)


def _value_name(value: Any) -> str:
    """A value as a part of a name; with a digest if it cannot be told from the part."""
    text = value if isinstance(value, str) else json.dumps(value)
    name = _UNFIT.sub("-", text).strip("-")
    if name == text and len(name) <= _LONGEST_VALUE:
        return name
    return f"{name[:_LONGEST_VALUE]}-{hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]}"
