"""Which checkpoint a run goes on from, and how its state gets back into the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.folder import Checkpoint, candidates, point_latest, set_aside
from skvr_dist.checkpoint.pieces import WEIGHTS, Pieces
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.optimizers import adam_steps, state_to_load, take_parameters, whole_parameters
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.run.folder import read_run, write_run
from skvr_dist.train.optimizer import go_on_from

_WEIGHTS_DEPEND_ON = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_norm",
    "attention_bias",
    "attention_output_bias",
    "tie_word_embeddings",
)


def resumable(config: Config) -> list[Path]:
    """The checkpoints that `train.resume` allows, the best first; none to start afresh.

    Raises:
        UserError: `never`, where checkpoints are.
    """
    output, asked = Path(config.train.output_dir), config.train.resume
    found = candidates(output / "checkpoints")
    if asked == "auto":
        return found
    if asked != "never":
        # The command that was interrupted is started again: what it has trained since is better.
        goes_on = read_run(output).get("resume") == _as_noted(asked)
        return [*found, Path(asked)] if goes_on else [Path(asked)]
    if found:
        raise UserError(
            f"train.resume is never, but {output} already holds checkpoints; use another train.output_dir or "
            f"resume=auto"
        )
    return []


def follow(config: Config, resumed: Checkpoint | None) -> list[Path]:
    """Make what a run goes on from the newest in its folder, and note what it was told; on one rank.

    Newer checkpoints, and all of them if it goes on from elsewhere, are of another training: they are set aside.

    Returns:
        where those are now.

    Raises:
        UserError: they cannot be moved.
    """
    output, asked = Path(config.train.output_dir), config.train.resume
    checkpoints = output / "checkpoints"
    try:
        left = []
        for path in candidates(checkpoints):
            if resumed is not None and path.resolve() == resumed.folder.resolve():
                break
            left.append(set_aside(path))
        if checkpoints.exists():
            point_latest(checkpoints)
        write_run(output, resume=asked if asked in ("auto", "never") else _as_noted(asked))
    except OSError as error:
        raise UserError(
            f"newer checkpoints in {checkpoints} cannot be set aside ({error.strerror}: {error.filename}); give rights"
        ) from None
    return left


def _as_noted(checkpoint: str) -> str:
    return str(Path(checkpoint).resolve())


def look_ahead(config: Config, data_fingerprint: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that a run would go on from, as far as one process can tell without reading its tensors.

    Raises:
        UserError: none is left, or it does not fit the configuration; or the initial weights of a new run do not.
    """
    problems = []
    for path in resumable(config):
        try:
            checkpoint = Checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        require_fits(checkpoint, config, data_fingerprint)
        return checkpoint
    _require_one(problems)
    if config.train.initial_weights:
        require_weights_fit(Checkpoint(config.train.initial_weights), config.model)
    return None


def _require_one(problems: list[str]) -> None:
    """A run never starts afresh where it had begun."""
    if problems:
        raise UserError(f"no checkpoint is left to go on from: {'; '.join(problems)}")


def resume(
    engine: RoutedPipelineEngine, config: Config, data_fingerprint: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """Load the first whole one of `resumable` into the engine, None to start afresh; collective.

    Returns:
        it, and what is wrong with those that were left out.

    Raises:
        UserError: it does not fit the configuration, or all are damaged.
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
    _require_one(problems)
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


def require_weights_fit(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Hold initial weights against the decoder that is to start from them.

    The attention kernel, positions and the norms' epsilon may change: they have no weights.

    Raises:
        UserError: they are of another shape.
    """
    for key in _WEIGHTS_DEPEND_ON:
        stored, asked = getattr(checkpoint.model_config, key), getattr(model, key)
        if stored != asked:
            raise UserError(
                f"initial weights {checkpoint.folder} have model.{key} {stored}, the configuration {asked}; give the "
                f"checkpoint's own value or other weights"
            )


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
    require_weights_fit(checkpoint, engine.stage.model_config)
    state = state_to_load(engine, adam_steps=0)
    _load(engine, checkpoint, {name: pieces for name, pieces in state.items() if name.startswith(WEIGHTS)})


def _load(engine: RoutedPipelineEngine, checkpoint: Checkpoint, state: Pieces) -> None:
    whole = whole_parameters(engine)
    checkpoint.read({**state, **whole}, engine.mesh.host_group)
    for name, parameters in whole.items():  # the masters lie in them, and need not be read again
        for master in state.get(name, []):
            master.fill_from(parameters[0])
    take_parameters(engine, whole)
