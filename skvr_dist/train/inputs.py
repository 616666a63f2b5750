"""What a run reads: data sets and the checkpoint it goes on from, held against the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skvr_dist.checkpoint.folder import Checkpoint, latest_checkpoint
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import SequenceStream, SourceData, validation_sequences
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizer import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.model.attention import require_backend
from skvr_dist.parallel.partition import stage_bounds
from skvr_dist.train.config import Config


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    sequences: SequenceStream
    """The training sequences by number."""
    held_out: list[MicroBatch]
    """The held-out micro-batches of each evaluation, as many for every replica."""
    resumed: Checkpoint | None


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Open what a run reads and hold it against the configuration, before any process group exists.

    Raises:
        UserError: a data set or checkpoint is missing, damaged or does not fit.
    """
    replicas = config.data_parallel_size(world_size)
    require_backend(config.model.attention)
    held_out = Dataset.open(config.data.validation)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    held_out.require_vocabulary(config.model.vocab_size)
    if tokenizer.sha256 != held_out.manifest.tokenizer_sha256:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer} is {tokenizer.sha256[:12]}, but data set {held_out.location} was "
            f"made with {held_out.manifest.tokenizer_sha256[:12]}; give the one beside the data set"
        )
    sequences = training_sequences(config)
    for source in sequences.sources.values():
        source.dataset.require_same_tokenizer(held_out)
    resumed = checkpoint_to_resume(config, world_size)
    if resumed and config.data.on_resume == "same_data":
        _require_same_data(resumed, sequences.fingerprint())
    round_size = config.train.micro_batch_size * replicas
    held_out_sequences = validation_sequences(
        held_out,
        sequence_length=config.data.sequence_length,
        num_sequences=-(-config.evaluate.sequences // round_size) * round_size,
    )
    separate_at = held_out.manifest.eos_id if config.data.documents == "separate" else None
    micro_batches = [
        MicroBatch.of(batch, separate_at) for batch in held_out_sequences.split(config.train.micro_batch_size)
    ]
    return Inputs(sequences, micro_batches, resumed)


def training_sequences(config: Config) -> SequenceStream:
    """The training sequences that a configuration names.

    Raises:
        UserError: a data set is missing or damaged, or they do not fit together.
    """
    skip = config.data.damage == "skip"
    sources = {
        name: SourceData(Dataset.open(source.path, check_sizes=not skip), source.weight)
        for name, source in config.data.train.items()
    }
    return SequenceStream(
        sources,
        sequence_length=config.data.sequence_length,
        lanes=config.data.lanes,
        seed=config.train.seed,
        separate_documents=config.data.documents == "separate",
        skip_damage=skip,
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


def checkpoint_to_resume(config: Config, world_size: int) -> Checkpoint | None:
    """The checkpoint that `train.resume` asks for, checked against model and layout."""
    output = Path(config.train.output_dir)
    latest = latest_checkpoint(output / "checkpoints")
    if config.train.resume == "never":
        if latest is not None:
            raise UserError(
                f"train.resume is never, but {output} already holds checkpoints; use another train.output_dir or "
                f"resume=auto"
            )
        return None
    path = latest if config.train.resume == "auto" else Path(config.train.resume)
    if path is None:
        return None
    checkpoint = Checkpoint(path)
    _require_same(checkpoint, "model", config.model.model_dump(exclude={"attention"}))  # the kernel may change
    _require_same(checkpoint, "routing", config.routing.model_dump())
    if checkpoint.facts["layout"] != layout_of(config, world_size):
        raise UserError(
            f"checkpoint {checkpoint.folder} was written by layout {checkpoint.facts['layout']}, this run has "
            f"{layout_of(config, world_size)}; resume on the same layout"
        )
    if checkpoint.step > config.train.steps:
        raise UserError(
            f"checkpoint {checkpoint.folder} is at step {checkpoint.step}, but train.steps is {config.train.steps}; "
            f"raise it to go on"
        )
    return checkpoint


def _require_same(checkpoint: Checkpoint, section: str, asked: dict[str, Any]) -> None:
    stored = checkpoint.config_tree[section]
    for key, value in asked.items():
        if stored[key] != value:
            raise UserError(
                f"checkpoint {checkpoint.folder} has {section}.{key} {stored[key]}, the configuration {value}; give "
                f"the checkpoint's own {section} section or start a new run"
            )


def layout_of(config: Config, world_size: int) -> dict[str, Any]:
    """What DeepSpeed's optimizer files and the place in the data depend on."""
    stages = config.parallel.pipeline
    return {
        "pipeline": stages,
        "stage_layers": [stop - start for start, stop in stage_bounds(config.model, config.parallel)],
        "replicas": world_size // stages,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.train.precision,
        "global_batch_size": config.train.global_batch_size,
        "micro_batch_size": config.train.micro_batch_size,
    }
