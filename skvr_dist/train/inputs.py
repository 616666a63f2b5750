"""The data sets that a run reads, compared with the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from skvr_dist.cluster.launcher import is_other_rank
from skvr_dist.config.data import DataConfig
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.train import TrainConfig
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.cores import require_few_processes
from skvr_dist.data.finetune.sequences import FinetuneSequences, sources_in_words
from skvr_dist.data.held_out import HeldOutSet, held_out_batches, open_held_out
from skvr_dist.data.reader import ExampleSet, SequenceStream, SourceData
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.model.attention_choice import require_installed
from skvr_dist.model.trained import is_trained, module_names, parameter_names
from skvr_dist.parallel.engine.deepspeed_json import require_accepted
from skvr_dist.parallel.engine.teacher import open_teacher, require_teachers_tokenizer
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.schedule import Schedule, first_step_at, jumps_of


@dataclass(frozen=True)
class Inputs:
    """The training and held-out data of a run."""

    sequences: SequenceStream
    """The training sequences by number."""
    held_out: list[MicroBatch]
    """The held-out micro-batches of each evaluation, as many for every replica."""
    examples: list[str]
    """What became of each file of fine-tuning examples, in words."""
    tokenizer: Tokenizer
    """That of all of them."""
    notices: list[str]
    """What is said of them at the start, though the run goes on."""


def open_inputs(config: Config, world_size: int) -> Inputs:
    """Open what a run reads and compare it with the configuration, before any process group exists.

    Raises:
        UserError: a data set is missing, damaged or does not fit.
    """
    replicas = require_startable(config, world_size)
    require_few_processes("data.workers", config.data.workers)
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer) if _has_examples(data) else None
    if tokenizer and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.tokenizer {data.tokenizer} has a vocabulary of {tokenizer.vocab_size}, but model.vocab_size is "
            f"{config.model.vocab_size}; it must be at least as large"
        )
    held_out = open_held_out(
        data.validation,
        tokenizer,
        tokenizer_path=data.tokenizer,
        sequence_length=data.sequence_length,
        cache=data.examples_cache,
    )
    tokenizer = tokenizer or load_tokenizer(data.tokenizer)
    if not is_other_rank():  # one per host reads it, and tells the others
        require_teachers_tokenizer(config, tokenizer)
    held_out_shards = [each for each in held_out if isinstance(each, Dataset)]
    for dataset in held_out_shards:
        dataset.require_vocabulary(config.model.vocab_size)
        require_made_with(dataset, tokenizer, data)
    sequences = training_sequences(data, config.train.seed, config.train)
    for dataset in sequences.datasets:
        if held_out_shards:
            dataset.require_same_tokenizer(held_out_shards[0])
        else:
            dataset.require_vocabulary(config.model.vocab_size)
            require_made_with(dataset, tokenizer, data)
    micro_batches = held_out_batches(
        held_out,
        sequence_length=data.sequence_length,
        sequences=config.evaluate.sequences,
        batch_size=config.train.micro_batch_size,
        separate_documents=data.documents == "separate",
        batches_multiple_of=replicas,
    )
    told = sources_in_words({f"data.train.{name}": source.dataset for name, source in sequences.sources.items()})
    told += sources_in_words(
        {f"data.validation.{name}": each for name, each in zip(data.validation, held_out, strict=True)}
    )
    return Inputs(sequences, micro_batches, told, tokenizer, _trained_on(data, sequences, held_out))


def _trained_on(data: DataConfig, sequences: SequenceStream, held_out: Sequence[HeldOutSet]) -> list[str]:
    """Which held-out sets are trained on, too, a sentence each: a trial of a few texts may want that, no other run."""
    return [
        f"data.validation.{name} is also trained on, as data.train.{trained}: held-out losses say what the model has "
        f"learnt by heart; hold out other data"
        for (name, held), opened in zip(data.validation.items(), held_out, strict=True)
        for trained, source in data.train.items()
        if opened.fingerprint == sequences.sources[trained].dataset.fingerprint
        or (held.has_examples and source.has_examples and os.path.realpath(held.path) == os.path.realpath(source.path))
    ]


def require_startable(config: Config, world_size: int) -> int:
    """Check all of a configuration that needs no data, before any process group exists; returns the replicas.

    Raises:
        UserError: a layout, an option of DeepSpeed's, a package, the teacher or `train.only` that cannot be had.
    """
    replicas = data_parallel_size(config, world_size)
    require_accepted(config, world_size)
    require_installed(config.model.attention)
    open_teacher(config)
    require_trainable(config)
    return replicas


def _has_examples(data: DataConfig) -> bool:
    """Whether a run reads fine-tuning examples."""
    return any(source.has_examples for source in [*data.train.values(), *data.validation.values()])


def require_trainable(config: Config) -> None:
    """Check that `train.only` names modules of the model, and leaves something to train on every stage.

    Raises:
        UserError: names the module or the stage, and what is known.
    """
    only = config.train.only
    if only is None:
        return
    known = module_names(parameter_names(config.model))
    for name in only:
        if name not in known:
            raise UserError(f"train.only names {name}, but the modules of the model are {', '.join(known)}")
    for stage, bounds in enumerate(stage_bounds(config.model, config.parallel, config.data.sequence_length)):
        names = parameter_names(config.model, *bounds)
        if not any(is_trained(name, only) for name in names):
            raise UserError(
                f"train.only {', '.join(only)} leaves nothing to train on pipeline stage {stage}, which has "
                f"{', '.join(module_names(names))}; add one of them, or use parallel.pipeline 1"
            )


def require_made_with(dataset: Dataset, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Refuse a tokenizer (`data.tokenizer`) to which the ids of a data set mean something else."""
    if not dataset.is_made_with(tokenizer):
        raise UserError(
            f"data.tokenizer {data.tokenizer} is {tokenizer.sha256[:12]}, but data set {dataset.location} was made "
            f"with {dataset.manifest.tokenizer_sha256[:12]}; give the one beside the data set"
        )


def training_sequences(data: DataConfig, seed: int, train: TrainConfig | None) -> SequenceStream:
    """The training sequences that a configuration names: its `data` section, and `train.seed`, which orders them.

    Args:
        train: the section that says at which sequences weights change, for those that do.

    Raises:
        UserError: a data set is missing or damaged, or they do not fit together.
    """
    skip = data.damage == "skip"
    tokenizer = None
    sources = {}
    for name, source in data.train.items():
        dataset: Dataset | ExampleSet
        if source.has_examples:
            tokenizer = tokenizer or load_tokenizer(data.tokenizer)
            dataset = FinetuneSequences.open(
                source,
                tokenizer,
                tokenizer_path=data.tokenizer,
                sequence_length=data.sequence_length,
                seed=seed,
                cache=data.examples_cache,
            )
        else:
            dataset = Dataset.open(source.path, check_sizes=not skip)
        sources[name] = SourceData(dataset, *_weights(name, source.weight, train))
    return SequenceStream(
        sources,
        sequence_length=data.sequence_length,
        lanes=data.lanes,
        seed=seed,
        separate_documents=data.documents == "separate",
        skip_damage=skip,
    )


def _weights(name: str, weight: float | Schedule, train: TrainConfig | None) -> tuple[float, dict[int, float]]:
    """The weight of a source at the first sequence, and those from later sequences on, by their numbers."""
    if not isinstance(weight, Schedule):
        return weight, {}
    if train is None:
        raise UserError(
            f"data.train.{name}.weight changes over the run, but the configuration has no whole train section, which "
            f"says when; add one, or give a number"
        )
    steps = [(first_step_at(place, weight.unit, train.horizon), height) for place, height in jumps_of(weight)]
    return weight.points[0][1], {step * train.global_batch_size: height for step, height in steps}
