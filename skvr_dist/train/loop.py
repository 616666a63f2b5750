"""Pretraining: start, step by step, finish."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from skvr_dist.checkpoint.brought import to_travel_on
from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.checkpoint.saver import Saver
from skvr_dist.checkpoint.together import open_together
from skvr_dist.cluster.arguments import unpack
from skvr_dist.cluster.interrupt import InterruptListener
from skvr_dist.cluster.launcher import (
    announced_local_size,
    announced_rank,
    announced_world_size,
    is_other_rank,
)
from skvr_dist.cluster.variables import in_words, passed_variables
from skvr_dist.config.layouts import zero_stage_in_use
from skvr_dist.config.load import dump_config
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import RunInterrupted
from skvr_dist.files import write_whole
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.engine.optimizers import state_to_save
from skvr_dist.parallel.engine.process_group import start_process_group
from skvr_dist.parallel.engine.refusals import telling_who_waits
from skvr_dist.parallel.failure import ending_together, naming_the_meeting, naming_the_operation
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.pipeline.plan_stream import PlanStream
from skvr_dist.routing import CacheStrategy, RoutingPlan
from skvr_dist.run.code import code_digest
from skvr_dist.run.folder import RunFolder
from skvr_dist.run.lock import RunLock
from skvr_dist.run.log import prints_to, software_versions, start_log, write_versions
from skvr_dist.train.attention import attention_notices, kernels_of
from skvr_dist.train.batches import WatchedBatches, open_reader, training_batches
from skvr_dist.train.build import build_engine, build_saver, layout_of
from skvr_dist.train.counts import StepCounts
from skvr_dist.train.gradient_norms import LayerGradientNorms
from skvr_dist.train.inputs import Inputs, open_inputs
from skvr_dist.train.metrics import Reporter
from skvr_dist.train.mfu import UtilisationMeter
from skvr_dist.train.plans import plan_stream
from skvr_dist.train.resume import preview_resume, resume, settle_resume
from skvr_dist.train.same_schedule import schedule_jumps
from skvr_dist.train.schedules import data_weights, routing_rates
from skvr_dist.train.shared_folder import require_shared_folder
from skvr_dist.train.slow_ranks import RankWatch
from skvr_dist.train.state import load_weights, progress_facts
from skvr_dist.train.usage import UsageWatch
from skvr_dist.train.writers import Values, require_writers


def pretrain(config: Config) -> None:
    """Train as configured, on this rank of those that the launcher started.

    Raises:
        UserError: the configuration does not fit the ranks, the data or the checkpoint.
        RunInterrupted: the run was preempted, and is saved; or another rank died.
    """
    folder = config.train.output_dir
    with telling_who_waits(folder):
        inputs = open_inputs(config, announced_world_size())
        run_id = prepare(config, inputs)
    start_process_group(timedelta(seconds=config.parallel.timeout_seconds), folder, run_id)
    with naming_the_meeting(announced_rank()):
        mesh = Mesh.build(config.parallel, config.model)
    with contextlib.ExitStack() as afterwards, ending_together(mesh):
        run = start(config, inputs, mesh)
        afterwards.callback(run.reporter.close)  # however it ends, and after the other ranks know
        with run.saver.finishing():
            step, interrupted = train(run)
            finish(run)
    if interrupted and step < config.train.steps:
        sentence = (
            f"{interrupted} ended the run after step {step}, which is saved; start it again, it resumes from there"
        )
        run.log.info(sentence)
        if mesh.rank == 0:
            RunFolder(folder).note_interruption(interrupted, step)
        raise RunInterrupted(sentence)


def train(run: Run) -> tuple[int, str | None]:
    """All steps that are left, or those until the run is asked to end; collective.

    Returns:
        the last step that was done, and the signals that ended the run, in words.
    """
    if run.evaluation_due:
        evaluate(run, run.first_step)
    interrupted, step = None, run.first_step
    while step < run.config.train.steps and not interrupted:
        step += 1
        train_step(run, step)
        if run.counts.save_failed:  # the steps up to the next save would be lost
            finish_save(run)
        interrupted = run.counts.interrupted()
        after_step(run, step, interrupted is not None)
    return step, interrupted


@dataclass
class Run:
    """All that a run holds on one rank."""

    config: Config
    mesh: Mesh
    engine: RoutedPipelineEngine
    log: logging.Logger
    reporter: Reporter
    saver: Saver
    plans: PlanStream
    batches: WatchedBatches
    held_out: list[MicroBatch]
    """This replica's held-out micro-batches."""
    strategies: dict[str, CacheStrategy]
    """The strategies to evaluate, by the names that the user gave."""
    counts: StepCounts
    watch: RankWatch
    usage: UsageWatch
    gradient_norms: LayerGradientNorms
    utilisation: UtilisationMeter
    first_step: int
    """Steps that are done already."""
    first_tokens: int
    """Tokens that those have seen: they may have been of other sequences (`data.on_resume`)."""
    evaluation_due: bool
    """Whether the run was preempted before the evaluation of that step."""
    facts: dict[str, Any]
    """Facts of every checkpoint: the data's fingerprint, and where the first weights came from."""


def prepare(config: Config, inputs: Inputs) -> str:
    """Prove that the run can begin, and lock its folder on rank 0.

    Returns:
        the run's id; empty on the other ranks, which rank 0 tells it.

    Raises:
        UserError: the folder cannot be written or another run is in it, a writer is missing, or no checkpoint fits.
    """
    folder = RunFolder(config.train.output_dir)
    if announced_rank() == 0:
        folder.prove_writable()
        require_writers(config.metrics)
    if not is_other_rank():  # one per host looks at the checkpoints
        preview_resume(config, inputs.sequences.fingerprint(), inputs.tokenizer)
    if announced_rank() > 0:
        return ""
    run = str(folder.notes().get("id") or uuid.uuid4().hex)
    RunLock(folder.path, run)
    folder.note(id=run)
    return run


def start(config: Config, inputs: Inputs, mesh: Mesh) -> Run:
    """Do everything that comes before the first step; collective."""
    fingerprint, folder = inputs.sequences.fingerprint(), RunFolder(config.train.output_dir)
    sections = {f"section {name}": section for name, section in config.model_dump().items()}
    versions = {f"version of {name}": version for name, version in software_versions().items()}
    mesh.require_same({**versions, "code of skvr_dist": code_digest(), "data": fingerprint, **sections})
    require_shared_folder(folder, mesh.rank, mesh.world_size)
    # A thousand files that say the same line of every step would help nobody.
    log = start_log(folder.log(mesh.rank), logging.INFO if mesh.rank == 0 else logging.WARNING)
    if mesh.rank == 0:
        _describe(config, mesh, folder)
    reader = open_reader(config, inputs.sequences, mesh)  # before the model, whose memory its processes would hold too
    with prints_to(folder.log(mesh.rank)), naming_the_operation(mesh, "reading the checkpoint"):
        engine = build_engine(config, mesh)
        mesh.require_same(kernels_of(config, engine.attention, engine.device))  # a package may be on some hosts only
        resumed, left_out = resume(engine, config, fingerprint)
        origin = resumed or load_initial_weights(engine, config)
        brought, lost = to_travel_on(origin, load_tokenizer(config.data.tokenizer))
    first_step = resumed.step if resumed else 0
    aside = settle_resume(config, resumed) if mesh.rank == 0 else []
    interrupts = InterruptListener()
    watched = WatchedBatches(training_batches(config, reader, mesh, first_step), log)
    reporter, saver = open_reporter(config, mesh, first_step, interrupts), build_saver(config, brought)
    run = Run(
        config,
        mesh,
        engine,
        log,
        reporter,
        saver=saver,
        plans=plan_stream(config, mesh, first_step),
        batches=watched,
        held_out=inputs.held_out[mesh.dp_rank :: mesh.dp_size],
        strategies=CacheStrategy.parse_all(
            config.evaluate.strategies, config.model.num_hidden_layers, config.evaluate.profiles
        ),
        counts=StepCounts(engine, watched, interrupts, saver),
        watch=RankWatch(mesh, config.train.watch_ranks_every_steps),
        usage=UsageWatch(mesh, config.train.watch_ranks_every_steps, config.train.steps),
        gradient_norms=LayerGradientNorms(engine, config, config.metrics.layer_gradient_norms_every_steps),
        utilisation=UtilisationMeter(config, mesh, engine.teacher_model),
        first_step=first_step,
        first_tokens=resumed.facts.tokens_seen if resumed else 0,
        evaluation_due=bool(resumed and resumed.facts.evaluation_due),
        facts={
            "data_fingerprint": fingerprint,
            "special_ids": brought.special_ids,
            **(origin.facts.origin() if origin else {}),
        },
    )
    jumps = schedule_jumps(resumed, config) if resumed else []
    notices = [f"{problem} (left out)" for problem in left_out] + [f"set aside: {path}" for path in aside]
    notices += [f"moved, as train.on_resume allows: {jump}" for jump in jumps]
    report_start(run, resumed, notices + inputs.examples + inputs.notices + ([lost] if lost else []))
    return run


def open_reporter(config: Config, mesh: Mesh, first_step: int, interrupts: InterruptListener) -> Reporter:
    """What records a run, which rank 0 may find that it cannot; collective."""
    reporter = Reporter(
        mesh.rank,
        RunFolder(config.train.output_dir),
        first_step=first_step,
        steps=config.train.steps,
        console_lost=interrupts.note_lost_console,
        settings=config.metrics,
    )
    mesh.host_group.sum([0.0])  # the others hear of it here; in the making of groups, which follows, they would not
    return reporter


def _describe(config: Config, mesh: Mesh, folder: RunFolder) -> None:
    """Write down what runs here: the resolved configuration, versions and layout."""
    write_whole(folder.config, dump_config(config))
    write_versions(folder.versions, layout_of(config, mesh.world_size).model_dump())


def load_initial_weights(engine: RoutedPipelineEngine, config: Config) -> Checkpoint | None:
    """Load the weights that a new run is told to start from, if any; collective."""
    if not config.train.initial_weights:
        return None
    mesh = engine.mesh
    checkpoint = open_together(config.train.initial_weights, mesh.host_group, looks=mesh.is_first_of_host)
    load_weights(engine, checkpoint)
    return checkpoint


_PARTS = {"full": "train/full_loss", "routed": "train/routed_loss", "divergence": "train/divergence"}
"""Tags of the parts of the loss of runs that distil, by the engine's names."""


def train_step(run: Run, step: int) -> None:
    """One optimizer step (counted from 1), and what is reported of it; collective.

    Raises:
        UserError: too many updates in a row were refused.
    """
    engine, batches = run.engine, run.batches
    started, waited_before = time.perf_counter(), batches.seconds
    run.counts.begin_step()
    run.gradient_norms.begin_step(step)
    plan = run.plans.next()
    learning_rate = engine.get_lr()[0]
    loss = engine.train_step(batches, plan)
    seconds = time.perf_counter() - started
    run.watch.add(seconds, *engine.stopwatch.read())
    run.usage.add(engine.stopwatch.parts)
    values: Values = {
        "train/loss": loss,
        "train/learning_rate": learning_rate,
        **{_PARTS[part]: value for part, value in engine.losses_by_part.items()},
        "train/gradient_norm": engine.gradient_norm,
        "train/predicted_tokens": engine.predicted_tokens,
        "train/skipped_steps": engine.guard.skipped_steps,
        "train/tokens_seen": tokens_seen(run, step),
        "train/tokens_per_second": tokens_per_step(run.config) / seconds,
        **run.gradient_norms.values(),
        **run.utilisation.values(step, plan, seconds, run.counts.document_pairs),
        "train/data_wait_share": (batches.seconds - waited_before) / seconds,
        **routing_values(plan),
        **{f"routing/{name}": value for name, value in routing_rates(run.config, step - 1).items()},
        **{f"data/weight/{name}": value for name, value in data_weights(run.config, step - 1).items()},
        **run.counts.values(skips_damage=run.config.data.damage == "skip"),
    }
    with naming_the_operation(run.mesh, f"the times of the ranks up to step {step}"):
        measured, slow = run.watch.report(step)
        values |= measured | run.usage.report(step)
    last = step == run.config.train.steps
    run.reporter.step(step, values, show=last or step % run.config.train.log_every_steps == 0)
    run.log.info(
        "step %d loss %.6f over %d tokens gradient norm %.6f", step, loss, engine.predicted_tokens, engine.gradient_norm
    )
    for sentence in slow:
        run.reporter.say(f"step {step}  {sentence}")
        run.log.warning("step %d %s", step, sentence)
    if engine.guard.reason:
        report_skipped(run, step)


def after_step(run: Run, step: int, interrupted: bool) -> None:
    """Evaluate and save when it is time; collective."""
    last = step == run.config.train.steps
    due = last or step % run.config.evaluate.every_steps == 0
    put_off = due and interrupted and not last  # a preempted run is not given much time
    if due and not put_off:
        evaluate(run, step)
    if last or interrupted or step % run.config.checkpoint.every_steps == 0:
        save(run, step, evaluation_due=put_off)


def evaluate(run: Run, step: int) -> None:
    """Measure and report the held-out loss at each strategy; collective."""
    losses = {name: run.engine.evaluate(run.held_out, s.kv_source_layers) for name, s in run.strategies.items()}
    run.reporter.evaluation(step, losses)


def save(run: Run, step: int, *, evaluation_due: bool) -> None:
    """Start to write a checkpoint, which is written while the next steps run; collective."""
    facts = progress_facts(
        run.engine,
        step,
        tokens_seen=tokens_seen(run, step),
        evaluation_due=evaluation_due,
        layout=layout_of(run.config, run.mesh.world_size),
        routing=run.config.routing.model_dump(),
        versions=software_versions(),
        **run.facts,
    )
    with naming_the_operation(run.mesh, f"the checkpoint of step {step}"):
        run.saver.save(
            state_to_save(run.engine), facts, lambda folder: run.reporter.say(f"step {step}  saved {folder}")
        )


def finish_save(run: Run) -> None:
    """Wait for the save that is under way, and raise what it has met; collective."""
    with naming_the_operation(run.mesh, "the last checkpoint"):
        run.saver.finish()


def finish(run: Run) -> None:
    """Wait for the last checkpoint and leave the other ranks; collective."""
    finish_save(run)
    run.plans.close()
    dist.destroy_process_group()


def tokens_seen(run: Run, step: int) -> int:
    """Tokens of all steps up to one of this training."""
    return run.first_tokens + (step - run.first_step) * tokens_per_step(run.config)


def tokens_per_step(config: Config) -> int:
    """Tokens of the global batch, whether they have labels or not."""
    return config.train.global_batch_size * config.data.sequence_length


def routing_values(plan: RoutingPlan) -> Values:
    """Shares of a plan's reads that cross layers, and of projections that are skipped."""
    return {
        "routing/cross_layer_share": plan.cross_layer_share,
        "routing/skipped_kv_share": plan.skipped_kv_share,
    }


def report_start(run: Run, resumed: Checkpoint | None, notices: list[str]) -> None:
    """Say how the run is laid out, what it starts from, and what else was noticed."""
    config, mesh = run.config, run.mesh
    run.reporter.say(
        f"{mesh.world_size} ranks: {mesh.pp_size} stages x {mesh.dp_size} replicas x {mesh.tp_size} tensor-parallel, "
        f"ZeRO {zero_stage_in_use(config, mesh.dp_size)}, {config.train.precision}; {config.num_micro_batches} "
        f"micro-batches of {config.train.micro_batch_size} x {config.data.sequence_length} tokens per step; routing "
        f"{config.routing.policy}"
    )
    for notice in attention_notices(config, run.engine.attention, run.engine.device):
        run.reporter.say(notice)
        run.log.info(notice)
    if config.train.only:
        run.reporter.say(f"trained are {', '.join(config.train.only)} alone (train.only)")
    if config.distillation:
        run.reporter.say(
            f"{config.num_distilled} micro-batches per step are distilled from {config.distillation.teacher}: "
            f"{config.num_passes} passes in all"
        )
    variables = f"variables: {in_words(passed_variables())}"
    run.log.info("arguments: %s", shlex.join(unpack(sys.argv[1:])))
    run.log.info(variables)
    if mesh.world_size > announced_local_size():
        run.reporter.say(variables)
    if resumed:
        run.reporter.say(f"resumed {resumed.folder} at step {resumed.step}")
    for notice in notices:
        run.reporter.say(notice)


def report_skipped(run: Run, step: int) -> None:
    """Say which batch was left out and why.

    Raises:
        UserError: too many in a row.
    """
    guard, batch = run.engine.guard, run.config.train.global_batch_size
    first = (step - 1) * batch
    sentence = f"step {step}  update skipped because {guard.reason}: sequences {first} to {first + batch - 1}"
    run.reporter.say(sentence)
    run.log.warning(sentence)
    guard.require_progress(step)
