"""Pretraining, top to bottom."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.folder import Checkpoint, clear_partial, partial_folder, publish
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import MicroBatchReader, SequenceStream
from skvr_dist.errors import UserError
from skvr_dist.parallel.engine import RoutedPipelineEngine
from skvr_dist.parallel.launcher import announced_world_size, start_process_group
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.partition import stage_bounds
from skvr_dist.parallel.plan_stream import PlanStream
from skvr_dist.parallel.stage import StageModule
from skvr_dist.train.config import Config
from skvr_dist.train.inputs import layout_of, open_inputs
from skvr_dist.train.metrics import Reporter, Values
from skvr_dist.train.optimizer import build_optimizer, build_scheduler, keep_settings
from skvr_dist.train.run_folder import RunFolder, software_versions


def pretrain(config: Config) -> None:
    """Train as configured, on this rank of those that the launcher started."""
    inputs = open_inputs(config, announced_world_size())
    resumed = inputs.resumed
    first_step = resumed.step if resumed else 0

    start_process_group()
    mesh = Mesh.build(config.parallel.pipeline)
    sections = {f"section {name}": section for name, section in config.model_dump().items()}
    mesh.require_same({"first step": first_step, "data": inputs.sequences.fingerprint(), **sections})
    run = RunFolder(config, mesh.rank)
    log = run.start_log()
    with run.quiet():
        engine = build_engine(config, mesh)
        if resumed:
            load_state(engine, resumed)
    plans = PlanStream(
        config.routing,
        mesh,
        num_layers=config.model.num_hidden_layers,
        num_micro_batches=config.num_micro_batches,
        seed=config.train.seed,
        first_step=first_step,
    )
    batches = WatchedBatches(training_batches(config, inputs.sequences, mesh, engine, first_step), log)
    held_out = inputs.held_out[mesh.replica :: mesh.replicas]
    strategies = config.evaluate.parse_strategies(config.model.num_hidden_layers)
    reporter = Reporter(
        mesh.rank, tensorboard=run.tensorboard, metrics=run.metrics, first_step=first_step, steps=config.train.steps
    )
    describe_start(config, mesh, run, reporter, resumed)

    for step in range(first_step + 1, config.train.steps + 1):
        started, sent_before, waited_before = time.perf_counter(), engine.sent_bytes, batches.seconds
        plan = plans.next()
        learning_rate = engine.get_lr()[0]
        loss = engine.train_step(batches, plan)
        seconds = time.perf_counter() - started
        values: Values = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/gradient_norm": engine.gradient_norm,
            "train/tokens_per_second": config.train.global_batch_size * config.data.sequence_length / seconds,
            "train/data_wait_share": (batches.seconds - waited_before) / seconds,
            "routing/cross_layer_share": plan.cross_layer_share,
            "routing/skipped_kv_share": plan.skipped_kv_share,
            **boundary_bytes(mesh, engine.sent_bytes - sent_before),
        }
        if config.data.damage == "skip":
            lost_tokens = batches.lost_tokens if engine.is_first_stage() else 0
            values["data/skipped_tokens"] = mesh.sum_over_ranks([float(lost_tokens)])[0]
        reporter.step(step, values, show=step % config.train.log_every_steps == 0 or step == config.train.steps)
        log.info("step %d loss %.6f gradient norm %.6f", step, loss, engine.gradient_norm)
        last = step == config.train.steps
        if last or step % config.evaluate.every_steps == 0:
            losses = {name: engine.evaluate(held_out, s.kv_source_layers) for name, s in strategies.items()}
            reporter.evaluation(step, losses)
        if last or step % config.checkpoint.every_steps == 0:
            folder = save(config, mesh, run, engine, step, inputs.sequences.fingerprint())
            reporter.say(f"step {step}  saved {folder}")
    plans.close()
    reporter.close()
    dist.destroy_process_group()


def build_engine(config: Config, mesh: Mesh) -> RoutedPipelineEngine:
    """This rank's stage, with initial weights, optimizer and schedule."""
    bounds = stage_bounds(config.model, config.parallel)
    return RoutedPipelineEngine(
        StageModule(config.model, bounds, mesh, config.train.seed),
        mesh,
        sequence_length=config.data.sequence_length,
        deepspeed_json=config.deepspeed_json(mesh.world_size),
        optimizer=functools.partial(build_optimizer, config.train),
        lr_scheduler=functools.partial(build_scheduler, config.train),
        separate_documents=config.data.documents == "separate",
    )


def load_state(engine: RoutedPipelineEngine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer state and schedule from a checkpoint of the same layout; collective."""
    with keep_settings(engine.basic_optimizer, engine.lr_scheduler):
        loaded, _ = engine.load_checkpoint(str(checkpoint.folder.parent), tag=checkpoint.folder.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found no state for this rank in {checkpoint.folder}; use another checkpoint")


def training_batches(
    config: Config, sequences: SequenceStream, mesh: Mesh, engine: RoutedPipelineEngine, first_step: int
) -> Iterator[MicroBatch]:
    """This replica's micro-batches from step `first_step` on; nothing on stages that read no tokens."""
    if not (engine.is_first_stage() or engine.is_last_stage() or engine.separate_documents):
        return iter(())
    return MicroBatchReader(
        sequences,
        micro_batch_size=config.train.micro_batch_size,
        micro_batches_per_step=config.num_micro_batches,
        replica=mesh.replica,
        replicas=mesh.replicas,
        start_step=first_step,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def boundary_bytes(mesh: Mesh, sent_bytes: int) -> Values:
    """Bytes of activations that crossed each boundary in this step, over all replicas; collective."""
    if mesh.stages == 1:
        return {}
    mine = [float(sent_bytes) if mesh.stage == boundary else 0.0 for boundary in range(mesh.stages - 1)]
    total = mesh.sum_over_ranks(mine)
    return {f"pipeline/crossing_bytes/boundary_{boundary}": value for boundary, value in enumerate(total)}


def save(
    config: Config, mesh: Mesh, run: RunFolder, engine: RoutedPipelineEngine, step: int, fingerprint: dict[str, Any]
) -> Path | None:
    """Write a checkpoint and make it the latest; collective. Returns its folder on rank 0."""
    if mesh.rank == 0:
        clear_partial(run.checkpoints, step)  # the others write after a barrier in save_checkpoint
    with run.quiet():
        engine.save_checkpoint(str(run.checkpoints), tag=partial_folder(step), save_latest=False)  # ends in a barrier
    if mesh.rank != 0:
        return None
    facts = {
        "step": step,
        "tokens_seen": step * config.train.global_batch_size * config.data.sequence_length,
        "layout": layout_of(config, mesh.world_size),
        "routing": config.routing.model_dump(),
        "data_fingerprint": fingerprint,
        "versions": software_versions(),
    }
    tokenizer = Path(config.data.tokenizer)
    return publish(run.checkpoints, step, config_text=config.to_yaml(), facts=facts, tokenizer=tokenizer)


def describe_start(config: Config, mesh: Mesh, run: RunFolder, reporter: Reporter, resumed: Checkpoint | None) -> None:
    if mesh.rank == 0:
        run.write_versions(layout_of(config, mesh.world_size))
    reporter.say(
        f"{mesh.world_size} ranks: {mesh.stages} stages x {mesh.replicas} replicas, ZeRO {config.parallel.zero_stage}, "
        f"{config.train.precision}; {config.num_micro_batches} micro-batches of {config.train.micro_batch_size} x "
        f"{config.data.sequence_length} tokens per step; routing {config.routing.policy}"
    )
    if resumed:
        reporter.say(f"resumed {resumed.folder} at step {resumed.step}")


class WatchedBatches(Iterator[MicroBatch]):
    """Micro-batches, with the seconds spent waiting for them and the labels that damage cost; logs the damage."""

    def __init__(self, source: Iterator[MicroBatch], log: logging.Logger) -> None:
        self._source = source
        self._log = log
        self._known_damage: set[str] = set()
        self.seconds = 0.0
        self.lost_tokens = 0

    def __next__(self) -> MicroBatch:
        started = time.perf_counter()
        try:
            batch = next(self._source)
        finally:
            self.seconds += time.perf_counter() - started
        self.lost_tokens += batch.lost_tokens
        for sentence in batch.damage:
            if sentence not in self._known_damage:  # workers and epochs meet it again
                self._known_damage.add(sentence)
                self._log.warning("left out: %s", sentence)
        return batch
