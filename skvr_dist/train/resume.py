"""Which checkpoint a run resumes from, what must fit, and what becomes of newer ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skvr_dist.checkpoint.brought import tokenizer_of_other_texts
from skvr_dist.checkpoint.folder import Checkpoint, candidates, point_latest, set_aside
from skvr_dist.checkpoint.together import open_together
from skvr_dist.config.tree import Config
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import local_path
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.same_schedule import ROUTING_SCHEDULES, require_begun, require_same_schedule
from skvr_dist.train.state import load_state, require_weights_fit


def resume_candidates(config: Config) -> list[Path]:
    """The checkpoints that `train.resume` allows, the best first; none to start afresh.

    Raises:
        UserError: it is `never`, but the run has checkpoints.
    """
    run, asked = RunFolder(Path(config.train.output_dir)), config.train.resume
    found = candidates(run.checkpoints)
    if asked == "auto":
        return found
    if asked != "never":
        # The command that was interrupted is started again: what it has trained since is better.
        continues = run.notes().get("resume") == _as_noted(asked)
        return [*found, local_path(asked)] if continues else [local_path(asked)]
    if found:
        raise UserError(
            f"train.resume is never, but {run.path} already holds checkpoints; use another train.output_dir or "
            f"resume=auto"
        )
    return []


def settle_resume(config: Config, resumed: Checkpoint | None) -> list[Path]:
    """Make the checkpoint that a run resumes from the newest in its folder, and note what it was told; on one rank.

    Newer checkpoints, and all of them if it resumes from elsewhere, are of another training: they are set aside.

    Returns:
        where those are now.

    Raises:
        UserError: they cannot be moved.
    """
    run, asked = RunFolder(config.train.output_dir), config.train.resume
    checkpoints = run.checkpoints
    try:
        left = []
        for path in candidates(checkpoints):
            if resumed is not None and path.resolve() == resumed.folder.resolve():
                break
            left.append(set_aside(path))
        if checkpoints.exists():
            point_latest(checkpoints)
        run.note(resume=asked if asked in ("auto", "never") else _as_noted(asked))
    except OSError as error:
        raise UserError(
            f"newer checkpoints in {checkpoints} cannot be set aside ({error.strerror}: {error.filename}); give rights"
        ) from None
    return left


def _as_noted(checkpoint: str) -> str:
    return str(local_path(checkpoint).resolve())


def preview_resume(
    config: Config, data_fingerprint: dict[str, Any], tokenizer: Tokenizer | None = None
) -> Checkpoint | None:
    """The checkpoint that a run would resume from, as far as one process can tell without reading its tensors.

    Args:
        tokenizer: that of the data; None compares none.

    Raises:
        UserError: none is left, or it does not fit the configuration; or the initial weights of a new run do not.
    """
    problems = []
    for path in resume_candidates(config):
        try:
            checkpoint = Checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        require_same_training(checkpoint, config, data_fingerprint)
        _require_same_tokenizer(checkpoint, config, tokenizer)
        return checkpoint
    _require_one(problems)
    require_begun(config, 0)
    if config.train.initial_weights:
        weights = Checkpoint(config.train.initial_weights)
        require_weights_fit(weights, config.model)
        _require_same_tokenizer(weights, config, tokenizer)
    return None


def _require_same_tokenizer(checkpoint: Checkpoint, config: Config, tokenizer: Tokenizer | None) -> None:
    """Refuse weights that were trained here on other texts for the ids of the data; an import leaves its own behind."""
    if tokenizer is None or not checkpoint.is_trained:
        return
    if theirs := tokenizer_of_other_texts(checkpoint, tokenizer):
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained with tokenizer {theirs.sha256[:12]}, to which tokens of "
            f"data.tokenizer {config.data.tokenizer} ({tokenizer.sha256[:12]}) are other texts; prepare the data with "
            f"{checkpoint.tokenizer_file}, or give other weights"
        )


def _require_one(problems: list[str]) -> None:
    """Refuse to start afresh when checkpoints exist but none can be used."""
    if problems:
        raise UserError(f"no checkpoint is left to resume from: {'; '.join(problems)}")


def resume(
    engine: RoutedPipelineEngine, config: Config, data_fingerprint: dict[str, Any]
) -> tuple[Checkpoint | None, list[str]]:
    """Load the first whole one of `resume_candidates` into the engine, None to start afresh; collective.

    Returns:
        it, and what is wrong with those that were left out.

    Raises:
        UserError: it does not fit the configuration, or all are damaged.
    """
    mesh = engine.mesh
    paths = resume_candidates(config)
    mesh.require_same({"checkpoints": [path.name for path in paths]})
    problems: list[str] = []
    for path in paths:
        try:
            checkpoint = open_together(path, mesh.host_group, looks=mesh.is_first_of_host)
        except UserError as error:
            problems.append(str(error))
            continue
        require_same_training(checkpoint, config, data_fingerprint)
        try:
            load_state(engine, checkpoint)
            return checkpoint, problems
        except UserError as error:  # the same one on all ranks; what was loaded is overwritten by the next
            problems.append(str(error))
    _require_one(problems)
    return None, []


def require_same_training(checkpoint: Checkpoint, config: Config, data_fingerprint: dict[str, Any]) -> None:
    """Compare a checkpoint with what is to resume from it. Layout, precision and the peak learning rate may change.

    Raises:
        UserError: it would not be the same training, or the checkpoint holds weights only.
    """
    if not checkpoint.has_moments:
        raise UserError(
            f"checkpoint {checkpoint.folder} holds weights only; start a new run with train.initial_weights="
            f"{checkpoint.folder}, in another train.output_dir than that of the weights and without train.resume"
        )
    _require_same(checkpoint, "model", config.model.model_dump(exclude={"attention"}))  # the kernel may change
    _require_same(checkpoint, "routing", config.routing.model_dump(exclude=set(ROUTING_SCHEDULES)))
    fixed = {"global_batch_size", "seed"}
    if config.routing.draws_per == "micro_batch" or config.distillation:
        fixed.add("micro_batch_size")  # it decides which sequences share donors, and which are distilled
    _require_same(checkpoint, "train", config.train.model_dump(include=fixed))
    _require_same_distillation(checkpoint, config)
    if checkpoint.step > config.train.steps:
        raise UserError(
            f"checkpoint {checkpoint.folder} is at step {checkpoint.step}, but train.steps is {config.train.steps}; "
            f"set it to {checkpoint.step} or more"
        )
    require_begun(config, checkpoint.step)
    require_same_schedule(checkpoint, config)
    if config.data.on_resume == "same_data":
        _require_same_data(checkpoint, data_fingerprint)


def _require_same_distillation(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse another loss than the checkpoint was trained with, unless `train.on_resume` says so."""
    if config.train.on_resume == "other_schedule":
        return
    there, here = (
        {} if each is None else each.model_dump() for each in (checkpoint.config.distillation, config.distillation)
    )
    for key in {**there, **here}:
        if there.get(key) != here.get(key):
            raise UserError(
                f"checkpoint {checkpoint.folder} has distillation.{key} {there.get(key)}, the configuration "
                f"{here.get(key)}; give the checkpoint's own value, start a new run, or change it from step "
                f"{checkpoint.step} on with train.on_resume=other_schedule"
            )


def _require_same_data(checkpoint: Checkpoint, reads: dict[str, Any]) -> None:
    """Refuse data in which the number of sequences read would mean another place than when it was saved."""
    if different := data_differences(checkpoint, reads):
        raise UserError(
            f"checkpoint {checkpoint.folder} was trained on other data than this configuration reads: they differ in "
            f"{', '.join(different)}; put it back, start a new run with another train.output_dir, or resume with the "
            f"other data with data.on_resume=other_data"
        )


def data_differences(checkpoint: Checkpoint, reads: dict[str, Any]) -> list[str]:
    """How the data that a checkpoint was trained on differs from what a run reads, in words."""
    trained = checkpoint.facts.data_fingerprint or {}
    return [text for key, value in reads.items() if (text := _difference(key, trained.get(key), value))]


def _difference(key: str, there: Any, here: Any) -> str:
    """How a fact about the data differs, in words; empty if it is the same."""
    if there != here:
        return f"{key} ({there} there, {here} here)"
    # Of sources it decides which of them a sequence comes from, as their weights do.
    if isinstance(here, dict) and list(there) != list(here):
        return f"the order of {key} ({', '.join(there)} there, {', '.join(here)} here)"
    return ""


def _require_same(checkpoint: Checkpoint, section: str, asked: dict[str, Any]) -> None:
    """Compare keys of a section with those that a checkpoint was trained with."""
    stored = getattr(checkpoint.config, section).model_dump()
    for key, value in asked.items():
        if stored[key] != value:
            raise UserError(
                f"checkpoint {checkpoint.folder} has {section}.{key} {stored[key]}, the configuration {value}; "
                f"give the checkpoint's own value or start a new run"
            )
