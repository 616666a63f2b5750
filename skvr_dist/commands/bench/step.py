"""Step time of routed training (uniform, 0.5) over standard training of the same model: at most 1 on one stage.

    skvr-bench step
    deepspeed --num_gpus 2 tools/bench.py step --json bench.json parallel.pipeline=2
    skvr-bench step --config bench --config qwen3-1.7b --least-mfu 0.55 train.precision=bf16 data.sequence_length=4096 \
        train.micro_batch_size=1
    skvr-bench step --against hf

Keys and values that nobody reads are not computed, so routing should cost nothing. Routed steps are those of the
configuration, uniform at 0.5 if it names none. `--against hf` times the same model, optimizer and batch in a loop of
transformers and DeepSpeed beside them, on one stage without tensor parallelism. On a GPU tokens per second, MFU and
memory, of all that is timed together, are printed too (docs/metrics.md). Exit code 1: the median ratio is above the
bound (`--bound`), the plain loop's below its own, or an MFU below `--least-mfu`.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import (
    Figure,
    add_bound,
    add_configs,
    add_json,
    add_overrides,
    at_least,
    conclude,
    exit_code_of,
    share,
)
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.config.tree import Config
    from skvr_dist.lab.bench.step import StepTimes
    from skvr_dist.parallel.mesh import Mesh


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser, default="bench")
    parser.add_argument("--rounds", type=at_least(2), default=40, help="steps of each kind (default: 40)")
    add_bound(parser, 1.0, "largest ratio allowed")
    parser.add_argument("--against", choices=("hf",), help="also time a plain loop of transformers and DeepSpeed")
    add_bound(parser, 1.0, "least time of the plain loop over that of standard steps", name="--against-bound")
    parser.add_argument(
        "--least-mfu", type=share, metavar="X", help="least MFU allowed, of both kinds of steps; on GPUs"
    )
    add_json(parser)
    add_overrides(parser)


def _require_of_a_plain_loop(config: Config) -> None:
    """Refuse what the plain loop does not do, so that both do the same.

    Raises:
        UserError: the configuration asks for it.
    """
    recomputed = config.parallel.activation_checkpointing.recompute
    if config.distillation:
        raise UserError("--against hf has one pass for each micro-batch, but the configuration distils; leave one out")
    if config.parallel.pipeline > 1 or config.parallel.tensor > 1:
        raise UserError(
            f"--against hf has data-parallel replicas alone, but parallel.pipeline is {config.parallel.pipeline} and "
            f"parallel.tensor {config.parallel.tensor}; set both to 1"
        )
    if config.train.only is not None or config.data.documents == "separate":
        raise UserError(
            "--against hf trains all weights on joined documents; leave train.only out and set data.documents to joined"
        )
    if recomputed != "none":
        raise UserError(
            f"--against hf recomputes nothing, but parallel.activation_checkpointing.recompute is {recomputed}; set it "
            f"to none"
        )


def run(options: Namespace) -> int:
    """Measure, over all ranks; returns the exit code."""
    import torch

    from skvr_dist.cluster.launcher import announced_world_size
    from skvr_dist.config.load import load_config
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.train.inputs import require_startable

    config = load_config(options.config, options.overrides)
    if options.against:
        _require_of_a_plain_loop(config)
    require_startable(config, announced_world_size())
    from skvr_dist.lab.bench.step import Kind, interleaved_step_times
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.routing import RoutingConfig
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.mfu import peak_of_ranks
    from skvr_dist.train.usage import memory_of_rank

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    if options.least_mfu is not None and not (peak_of_ranks(mesh, config.train.precision) or math.nan) > 0:
        raise UserError("--least-mfu needs bf16 on GPUs whose peak is known (docs/metrics.md); leave it out")
    engine = build_engine(config, mesh)
    routing = config.routing
    if routing.policy == "none":
        routing = RoutingConfig(policy="uniform", cross_layer_prob=0.5)
    unrouted = RoutingConfig(policy="none")
    kinds = [Kind("standard", engine.train_step, unrouted), Kind("routed", engine.train_step, routing)]
    if options.against:
        from skvr_dist.lab.bench.plain_loop import PlainLoop

        plain = PlainLoop(config, mesh)
        kinds.append(Kind("transformers + DeepSpeed", lambda batches, _: plain.step(batches), unrouted))
    times = interleaved_step_times(config, mesh, kinds, options.rounds, engine.teacher_model)
    standard, routed, *others = times
    figures = [_ratio_figure(routed, standard, options.bound, mesh)]
    figures += [_ratio_figure(other, standard, options.against_bound, mesh, at_least=True) for other in others]
    if options.least_mfu is not None:
        figures += [_mfu_figure(each, options.least_mfu) for each in (standard, routed)]
    if mesh.rank != 0:
        return exit_code_of(figures)
    tokens = config.train.global_batch_size * config.data.sequence_length
    record: dict[str, object] = {"tokens": tokens, "stages": mesh.pp_size, "replicas": mesh.dp_size}
    record |= {"bound": options.bound, "seconds": {each.name: each.seconds for each in times}}
    memory = memory_of_rank(mesh.devices.device_type == "cuda").get("allocated_peak_gib")
    if memory is not None:
        record |= {"mfu": [standard.mfu, routed.mfu], "peak_gib": memory, "device": torch.cuda.get_device_name()}
    table = _table(times, tokens, memory)
    return conclude(figures, table=table, record=record, json_file=options.json)


def _ratio_figure(one: StepTimes, other: StepTimes, bound: float, mesh: Mesh, at_least: bool = False) -> Figure:
    """Time of one kind of step over that of another, at most or at least the bound."""
    from skvr_dist.lab.bench.step import Ratio

    ratio = Ratio.of(one, other)
    return Figure(
        f"{one.name} / {other.name}: {ratio.median:.3f} (quartiles {ratio.lower_quartile:.3f} to "
        f"{ratio.upper_quartile:.3f}, fastest steps {one.fastest / other.fastest:.3f}, {len(one.seconds)} pairs, "
        f"{mesh.pp_size} stages x {mesh.dp_size} replicas)",
        f"{bound:.2f}",
        ratio.median >= bound if at_least else ratio.median <= bound,
    )


def _table(kinds: Sequence[StepTimes], tokens: int, memory: float | None) -> str:
    """A row for each kind of step.

    Args:
        tokens: of a step.
        memory: the most GiB that this rank's GPU held; None on CPUs.
    """
    headers = ["steps", "median step (ms)", "fastest (ms)", "K/V projections skipped", "tokens/s"]
    rows = [
        [
            each.name,
            f"{1e3 * each.median:.1f}",
            f"{1e3 * each.fastest:.1f}",
            f"{each.skipped_kv_share:.0%}",
            f"{tokens / each.median:,.0f}",
        ]
        for each in kinds
    ]
    if memory is not None:
        headers += ["MFU", "peak memory (GiB)"]
        rows = [[*row, f"{each.mfu:.1%}", f"{memory:.2f}"] for row, each in zip(rows, kinds, strict=True)]
    return tabulate(rows, headers=headers, tablefmt="github")


def _mfu_figure(times: StepTimes, least: float) -> Figure:
    mfu = math.nan if times.mfu is None else times.mfu
    return Figure(f"MFU of {times.name}: {mfu:.1%}", f"{least:.0%}", mfu >= least)
