"""Builds what a configuration describes, on each rank: the engine, and the saver of its checkpoints."""

from __future__ import annotations

import functools

from skvr_dist.checkpoint.brought import NOTHING_BROUGHT, Brought
from skvr_dist.checkpoint.facts import LayoutFacts
from skvr_dist.checkpoint.folder import TOKENIZER_FILE
from skvr_dist.checkpoint.saver import Saver
from skvr_dist.checkpoint.together import open_together
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import dump_config
from skvr_dist.config.tree import Config
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json, naming_refused_options
from skvr_dist.parallel.engine.distillation import Distillation
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.stage import StageModule
from skvr_dist.parallel.engine.teacher import FrozenTeacher
from skvr_dist.parallel.guard import UpdateGuard
from skvr_dist.parallel.mesh import Mesh, new_host_group
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.optimizer import build_optimizer, build_scheduler
from skvr_dist.train.passes import passes_of_step


def build_engine(config: Config, mesh: Mesh) -> RoutedPipelineEngine:
    """This rank's stage, with initial weights, optimizer and schedule; collective.

    Raises:
        UserError: DeepSpeed refuses options of the `deepspeed` section that it has read without complaint.
    """
    with naming_refused_options(config.deepspeed):
        return _engine(config, mesh)


def _engine(config: Config, mesh: Mesh) -> RoutedPipelineEngine:
    options = deepspeed_json(config, mesh.world_size)
    return RoutedPipelineEngine(
        StageModule(
            config.model,
            config.parallel,
            mesh,
            config.train.seed,
            options,
            config.data.sequence_length,
            config.train.only,
        ),
        mesh,
        guard=UpdateGuard(
            max_loss_ratio=config.train.max_loss_ratio,
            max_skipped_in_a_row=config.train.max_skipped_steps_in_a_row,
        ),
        sequence_length=config.data.sequence_length,
        deepspeed_json=options,
        optimizer=functools.partial(build_optimizer, config.train),
        lr_scheduler=functools.partial(build_scheduler, config.train),
        separate_documents=config.data.documents == "separate",
        distillation=build_distillation(config, mesh),
    )


def build_distillation(config: Config, mesh: Mesh) -> Distillation | None:
    """What the engine needs to know of the distillation section, if there is one; collective."""
    if config.distillation is None:
        return None
    teacher = None
    if not config.distillation.is_own:
        path, looks = config.distillation.teacher, mesh.is_first_of_host
        teacher = FrozenTeacher(open_together(path, mesh.host_group, looks=looks), config, mesh)
    return Distillation(functools.partial(passes_of_step, config), config.distillation.temperature, teacher)


def build_saver(config: Config, brought: Brought = NOTHING_BROUGHT) -> Saver:
    """The saver of this run's checkpoints; collective.

    Args:
        brought: what the run takes over from the checkpoint that it starts from.
    """
    tokenizer = {} if brought.names_tokenizer else {TOKENIZER_FILE: load_tokenizer(config.data.tokenizer).model}
    return Saver(
        RunFolder(config.train.output_dir).checkpoints,
        new_host_group(),
        config_text=dump_config(config),
        files={**tokenizer, **brought.files},
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        megabytes_per_second=config.checkpoint.megabytes_per_second,
    )


def layout_of(config: Config, world_size: int) -> LayoutFacts:
    """The layout of a run, for the record."""
    return LayoutFacts(
        pipeline=[
            stop - start for start, stop in stage_bounds(config.model, config.parallel, config.data.sequence_length)
        ],
        tensor=config.parallel.tensor,
        replicas=data_parallel_size(config, world_size),
        zero_stage=config.parallel.zero_stage,
        precision=config.train.precision,
    )
