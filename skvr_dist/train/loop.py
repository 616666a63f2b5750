"""Pretraining, top to bottom."""

from __future__ import annotations

import functools
import logging
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.checkpoint.saver import Saver
from skvr_dist.cluster.interrupt import InterruptListener
from skvr_dist.cluster.launcher import announced_rank, announced_world_size
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.reader import MicroBatchReader, SequenceStream
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import RunInterrupted
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.optimizers import state_to_save
from skvr_dist.parallel.engine.process_group import start_process_group
from skvr_dist.parallel.engine.stage import StageModule
from skvr_dist.parallel.failure import naming_the_operation
from skvr_dist.parallel.guard import UpdateGuard
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.plan_stream import PlanStream
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.run.folder import RunFolder, read_run, software_versions, wait_for_run_id, write_run
from skvr_dist.run.lock import RunLock
from skvr_dist.train.metrics import Reporter, Values
from skvr_dist.train.optimizer import build_optimizer, build_scheduler
from skvr_dist.train.start import open_inputs
from skvr_dist.train.state import follow, load_weights, look_ahead, place_of, resume


def pretrain(config: Config) -> None:
    """Train as configured, on this rank of those that the launcher started."""
    inputs = open_inputs(config, announced_world_size())
    fingerprint = inputs.sequences.fingerprint()
    look_ahead(config, fingerprint)
    join_run(config)
    mesh = Mesh.build(config.parallel, config.model)
    sections = {f"section {name}": section for name, section in config.model_dump().items()}
    mesh.require_same({"data": fingerprint, **sections})
    run = RunFolder(config, mesh.rank)
    log = run.start_log()
    with run.quiet(), naming_the_operation(mesh, "reading the checkpoint"):
        engine = build_engine(config, mesh)
        resumed, left_out = resume(engine, config, fingerprint)
        origin = resumed.origin if resumed else {}
        if not resumed and config.train.initial_weights:
            initial = Checkpoint(config.train.initial_weights)
            load_weights(engine, initial)
            origin = initial.origin
    first_step = resumed.step if resumed else 0
    aside = follow(config, resumed) if mesh.rank == 0 else []
    saver = build_saver(config, run)
    plans = plan_stream(config, mesh, first_step)
    batches = WatchedBatches(training_batches(config, inputs.sequences, mesh, engine, first_step), log)
    held_out = inputs.held_out[mesh.dp_rank :: mesh.dp_size]
    strategies = config.evaluate.parse_strategies(config.model.num_hidden_layers)
    reporter = Reporter(
        mesh.rank, tensorboard=run.tensorboard, metrics=run.metrics, first_step=first_step, steps=config.train.steps
    )
    describe_start(config, mesh, run, reporter, resumed)
    for problem in left_out:
        reporter.say(f"{problem} (left out)")
    for path in aside:
        reporter.say(f"set aside: {path}")
    interrupts = InterruptListener(mesh.sum_over_ranks)
    interrupted = None

    def evaluate(step: int) -> None:
        losses = {name: engine.evaluate(held_out, s.kv_source_layers) for name, s in strategies.items()}
        reporter.evaluation(step, losses)

    if resumed and resumed.facts["evaluation_due"]:
        evaluate(first_step)
    for step in range(first_step + 1, config.train.steps + 1):
        started, sent_before, waited_before = time.perf_counter(), engine.sent_bytes, batches.seconds
        plan = plans.next()
        learning_rate = engine.get_lr()[0]
        loss = engine.train_step(batches, plan)
        tokens = engine.predicted_tokens
        seconds = time.perf_counter() - started
        values: Values = {
            "train/loss": loss,
            "train/learning_rate": learning_rate,
            "train/gradient_norm": engine.gradient_norm,
            "train/predicted_tokens": tokens,
            "train/skipped_steps": engine.guard.skipped_steps,
            "train/tokens_per_second": config.train.global_batch_size * config.data.sequence_length / seconds,
            "train/data_wait_share": (batches.seconds - waited_before) / seconds,
            "routing/cross_layer_share": plan.cross_layer_share,
            "routing/skipped_kv_share": plan.skipped_kv_share,
            **boundary_bytes(mesh, engine.sent_bytes - sent_before),
        }
        if config.data.damage == "skip":
            lost_tokens = batches.lost_tokens if engine.is_first_stage() and mesh.tp_rank == 0 else 0
            values["data/skipped_tokens"] = mesh.sum_over_ranks([float(lost_tokens)])[0]
        reporter.step(step, values, show=step % config.train.log_every_steps == 0 or step == config.train.steps)
        log.info("step %d loss %.6f over %d tokens gradient norm %.6f", step, loss, tokens, engine.gradient_norm)
        if engine.guard.reason:
            report_skipped(config, engine.guard, step, reporter, log)
        interrupted = interrupts.received()
        last = step == config.train.steps
        due = last or step % config.evaluate.every_steps == 0
        put_off = due and bool(interrupted) and not last  # whoever interrupts does not wait for long
        if due and not put_off:
            evaluate(step)
        if last or interrupted or step % config.checkpoint.every_steps == 0:
            facts = {"data_fingerprint": fingerprint, "evaluation_due": put_off, **origin}
            save(config, mesh, saver, engine, step, facts, reporter)
        if interrupted:
            break
    with naming_the_operation(mesh, "the last checkpoint"):
        saver.finish()
    plans.close()
    reporter.close()
    dist.destroy_process_group()
    if interrupted and not last:
        sentence = (
            f"{interrupted} ended the run after step {step}, which is saved; start it again, it goes on from there"
        )
        log.info(sentence)
        raise RunInterrupted(sentence)


def join_run(config: Config) -> None:
    """Lock the run's folder, on rank 0, and join the other ranks of the run.

    Raises:
        UserError: another run is in the folder.
    """
    output, seconds = Path(config.train.output_dir), config.parallel.timeout_seconds
    if announced_rank() == 0:
        run = read_run(output).get("id") or uuid.uuid4().hex
        RunLock(output, run)
        write_run(output, id=run)
    else:
        run = wait_for_run_id(output, seconds)
    start_process_group(timedelta(seconds=seconds), run)


def build_engine(config: Config, mesh: Mesh) -> RoutedPipelineEngine:
    """This rank's stage, with initial weights, optimizer and schedule."""
    return RoutedPipelineEngine(
        StageModule(config.model, config.parallel, mesh, config.train.seed),
        mesh,
        guard=UpdateGuard(
            max_loss_ratio=config.train.max_loss_ratio,
            max_skipped_in_a_row=config.train.max_skipped_steps_in_a_row,
        ),
        sequence_length=config.data.sequence_length,
        deepspeed_json=config.deepspeed_json(mesh.world_size),
        optimizer=functools.partial(build_optimizer, config.train),
        lr_scheduler=functools.partial(build_scheduler, config.train),
        separate_documents=config.data.documents == "separate",
    )


def plan_stream(config: Config, mesh: Mesh, first_step: int) -> PlanStream:
    """The routing plans from step `first_step` on; collective."""
    return PlanStream(
        config.plan,
        mesh,
        shape=(config.num_micro_batches, config.model.num_hidden_layers),
        first_step=first_step,
        compare_every_steps=config.parallel.verify_plan_every_steps,
    )


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
        replica=mesh.dp_rank,
        replicas=mesh.dp_size,
        start_step=first_step,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
    )


def report_skipped(config: Config, guard: UpdateGuard, step: int, reporter: Reporter, log: logging.Logger) -> None:
    """Say which batch was left out and why.

    Raises:
        UserError: too many in a row.
    """
    first = (step - 1) * config.train.global_batch_size
    sentence = (
        f"step {step}  update skipped because {guard.reason}: sequences {first} to "
        f"{first + config.train.global_batch_size - 1}"
    )
    reporter.say(sentence)
    log.warning(sentence)
    guard.require_progress(step)


def boundary_bytes(mesh: Mesh, sent_bytes: int) -> Values:
    """Bytes of activations that crossed each boundary in this step, over all replicas; collective."""
    if mesh.pp_size == 1:
        return {}
    mine = [float(sent_bytes) if mesh.pp_rank == boundary else 0.0 for boundary in range(mesh.pp_size - 1)]
    total = mesh.sum_over_ranks(mine)
    return {f"pipeline/crossing_bytes/boundary_{boundary}": value for boundary, value in enumerate(total)}


def build_saver(config: Config, run: RunFolder) -> Saver:
    """What writes this run's checkpoints; collective."""
    return Saver(
        run.checkpoints,
        config_text=config.to_yaml(),
        tokenizer=Tokenizer.load(config.data.tokenizer).model,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        megabytes_per_second=config.checkpoint.megabytes_per_second,
    )


def save(
    config: Config,
    mesh: Mesh,
    saver: Saver,
    engine: RoutedPipelineEngine,
    step: int,
    facts: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Start to write a checkpoint, which goes on while the next steps run; collective."""
    facts = {
        **facts,
        **place_of(engine, step),
        "tokens_seen": step * config.train.global_batch_size * config.data.sequence_length,
        "layout": layout_of(config, mesh.world_size),
        "routing": config.routing.model_dump(),
        "versions": software_versions(),
    }
    with naming_the_operation(mesh, f"the checkpoint of step {step}"):
        saver.save(step, state_to_save(engine), facts, lambda folder: reporter.say(f"step {step}  saved {folder}"))


def layout_of(config: Config, world_size: int) -> dict[str, Any]:
    """How the run is laid out, for the record; any other layout can go on from its checkpoints."""
    return {
        "pipeline": [stop - start for start, stop in stage_bounds(config.model, config.parallel)],
        "tensor": config.parallel.tensor,
        "replicas": config.data_parallel_size(world_size),
        "zero_stage": config.parallel.zero_stage,
        "precision": config.train.precision,
    }


def describe_start(config: Config, mesh: Mesh, run: RunFolder, reporter: Reporter, resumed: Checkpoint | None) -> None:
    if mesh.rank == 0:
        run.write_versions(layout_of(config, mesh.world_size))
    reporter.say(
        f"{mesh.world_size} ranks: {mesh.pp_size} stages x {mesh.dp_size} replicas x {mesh.tp_size} tensor-parallel, "
        f"ZeRO {config.parallel.zero_stage}, {config.train.precision}; {config.num_micro_batches} micro-batches of "
        f"{config.train.micro_batch_size} x {config.data.sequence_length} tokens per step; routing "
        f"{config.routing.policy}"
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
