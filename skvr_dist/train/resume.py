"""Which checkpoint a run goes on from, and how its state gets back into the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.folder import Checkpoint, candidates, damaged_files
from skvr_dist.checkpoint.pieces import WEIGHTS
from skvr_dist.checkpoint.storage import read_pieces
from skvr_dist.errors import UserError
from skvr_dist.parallel.engine import RoutedPipelineEngine
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.partitions import adam_steps, state_to_load, take_parameters, whole_parameters
from skvr_dist.train.config import Config
from skvr_dist.train.optimizer import go_on_from


def resumable(config: Config) -> list[Path]:
    """The checkpoints that `train.resume` allows, the best first; none to start afresh.

    Raises:
        UserError: `never`, where checkpoints are.
    """
    output = Path(config.train.output_dir)
    found = candidates(output / "checkpoints")
    if config.train.resume == "auto":
        return found
    if config.train.resume != "never":
        return [Path(config.train.resume)]
    if found:
        raise UserError(
            f"train.resume is never, but {output} already holds checkpoints; use another train.output_dir or "
            f"resume=auto"
        )
    return []


def look_ahead(config: Config, data_fingerprint: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that a run would go on from, as far as one process can tell without reading its tensors.

    Raises:
        UserError: it does not fit the configuration; or the weights of a new run are no checkpoint.
    """
    for path in resumable(config):
        try:
            checkpoint = Checkpoint(path)
        except UserError:
            if config.train.resume != "auto":
                raise
            continue
        require_fits(checkpoint, config, data_fingerprint)
        return checkpoint
    if config.train.initial_weights:
        Checkpoint(config.train.initial_weights)
    return None


def choose(config: Config, mesh: Mesh) -> tuple[Checkpoint | None, list[str]]:
    """The first whole one of `resumable`, None to start afresh; collective.

    The ranks share the reading: every byte is compared with the manifest once.

    Returns:
        it, and what is wrong with those that were left out.

    Raises:
        UserError: the one that was asked for is damaged, or all are. A run never starts afresh where it had begun.
    """
    paths = resumable(config)
    mesh.require_same({"checkpoints": [path.name for path in paths]})
    problems: list[str] = []
    for path in paths:
        checkpoint, problem = _verified(path, mesh)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    if problems:
        raise UserError(f"no checkpoint is left to go on from: {'; '.join(problems)}")
    return None, []


def _verified(path: Path, mesh: Mesh) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, or what is wrong with it, as all ranks together see it."""
    checkpoint, problem = None, None
    try:
        checkpoint = Checkpoint(path)
        damaged = damaged_files(
            checkpoint.folder, checkpoint.files, list(checkpoint.files)[mesh.rank :: mesh.world_size]
        )
        if damaged:
            problem = f"checkpoint {checkpoint.folder} is damaged: {', '.join(damaged)} changed since it was written"
    except UserError as error:
        problem = str(error)
    seen: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(seen, problem, group=mesh.host_group)
    return checkpoint, next((found for found in seen if found is not None), None)


def require_fits(checkpoint: Checkpoint, config: Config, data_fingerprint: dict[str, Any]) -> None:
    """Hold a checkpoint against what is to go on from it. Layout, precision and learning rate may change.

    Raises:
        UserError: it would not be the same training.
    """
    _require_same(checkpoint, "model", config.model.model_dump(exclude={"attention"}))  # the kernel may change
    _require_same(checkpoint, "routing", config.routing.model_dump())
    # They decide which sequences share donors.
    _require_same(
        checkpoint, "train", config.train.model_dump(include={"global_batch_size", "micro_batch_size", "seed"})
    )
    if not checkpoint.has_moments:
        raise UserError(
            f"checkpoint {checkpoint.folder} holds weights only; start a new run with train.initial_weights="
            f"{checkpoint.folder}"
        )
    if checkpoint.step > config.train.steps:
        raise UserError(
            f"checkpoint {checkpoint.folder} is at step {checkpoint.step}, but train.steps is {config.train.steps}; "
            f"raise it to go on"
        )
    if config.data.on_resume == "same_data":
        _require_same_data(checkpoint, data_fingerprint)


def _require_same_data(checkpoint: Checkpoint, reads: dict[str, Any]) -> None:
    """Refuse data with which the checkpoint's place in it would mean another one."""
    trained = checkpoint.facts["data_fingerprint"]
    different = [
        f"{key} ({trained.get(key)} there, {value} here)" for key, value in reads.items() if trained.get(key) != value
    ]
    if different:
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained on other data than this configuration reads: they differ in "
            f"{', '.join(different)}; put it back, start a new run with another train.output_dir, or go on with the "
            f"other data with data.on_resume=other_data"
        )


def _require_same(checkpoint: Checkpoint, section: str, asked: dict[str, Any]) -> None:
    stored = checkpoint.config_tree[section]
    for key, value in asked.items():
        if stored.get(key) != value:
            raise UserError(
                f"checkpoint {checkpoint.folder} has {section}.{key} {stored.get(key)}, the configuration {value}; "
                f"give the checkpoint's own value or start a new run"
            )


def place_of(engine: RoutedPipelineEngine, step: int) -> dict[str, Any]:
    """What a checkpoint must say of a run besides its tensors, for `load_state`."""
    return {"step": step, "adam_steps": adam_steps(engine), "guard": engine.guard.state()}


def load_state(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Weights, moments and place in the schedule, from a checkpoint of any layout; collective."""
    group = engine.mesh.host_group
    read_pieces(checkpoint.folder, state_to_load(engine, checkpoint.facts["adam_steps"]), group)
    _load_parameters(engine, checkpoint.folder)
    engine.global_steps = checkpoint.step
    engine.guard.load_state(checkpoint.facts["guard"])
    go_on_from(engine.lr_scheduler, checkpoint.step)


def load_weights(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Weights alone, as a new run's start; collective.

    Raises:
        UserError: they are of another architecture.
    """
    state = state_to_load(engine, adam_steps=0)
    weights = {name: pieces for name, pieces in state.items() if name.startswith(WEIGHTS)}
    read_pieces(checkpoint.folder, weights, engine.mesh.host_group)
    _load_parameters(engine, checkpoint.folder)


def _load_parameters(engine: RoutedPipelineEngine, folder: Path) -> None:
    whole = whole_parameters(engine)
    read_pieces(folder, whole, engine.mesh.host_group)
    take_parameters(engine, whole)
