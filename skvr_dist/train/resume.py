"""Which checkpoint a run goes on from, and how its state gets back into the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.folder import Checkpoint, candidates
from skvr_dist.checkpoint.pieces import WEIGHTS, Pieces
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


def resume(
    engine: RoutedPipelineEngine, config: Config, data_fingerprint: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """Load the first whole one of `resumable` into the engine, None to start afresh; collective.

    Returns:
        it, and what is wrong with those that were left out.

    Raises:
        UserError: it does not fit the configuration; the one that was asked for is damaged, or all are. A run never
            starts afresh where it had begun.
    """
    mesh = engine.mesh
    paths = resumable(config)
    mesh.require_same({"checkpoints": [path.name for path in paths]})
    problems: list[str] = []
    for path in paths:
        checkpoint, problem = _opened(path, mesh)
        if checkpoint and problem is None:
            require_fits(checkpoint, config, data_fingerprint)
            try:
                load_state(engine, checkpoint)
                return checkpoint, problems
            except UserError as error:  # the same one on all ranks; what was loaded is overwritten by the next
                problem = str(error)
        problems.append(str(problem))
    if problems:
        raise UserError(f"no checkpoint is left to go on from: {'; '.join(problems)}")
    return None, []


def _opened(path: Path, mesh: Mesh) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, or what is wrong with it on any rank; collective."""
    checkpoint, problem = None, None
    try:
        checkpoint = Checkpoint(path)
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
    """Weights, moments and place in the schedule, from a checkpoint of any layout; collective.

    Raises:
        UserError: on all ranks: it is of another architecture, or damaged.
    """
    _load(engine, checkpoint, state_to_load(engine, checkpoint.facts["adam_steps"]))
    engine.global_steps = checkpoint.step
    engine.guard.load_state(checkpoint.facts["guard"])
    go_on_from(engine.lr_scheduler, checkpoint.step)


def load_weights(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Weights alone, as a new run's start; collective.

    Raises:
        UserError: on all ranks: they are of another architecture, or the checkpoint is damaged.
    """
    state = state_to_load(engine, adam_steps=0)
    _load(engine, checkpoint, {name: pieces for name, pieces in state.items() if name.startswith(WEIGHTS)})


def _load(engine: RoutedPipelineEngine, checkpoint: Checkpoint, state: Pieces) -> None:
    whole = whole_parameters(engine)
    checkpoint.read({**state, **whole}, engine.mesh.host_group)
    for name, parameters in whole.items():  # the masters lie in them, and need not be read again
        for master in state.get(name, []):
            master.fill_from(parameters[0])
    take_parameters(engine, whole)
