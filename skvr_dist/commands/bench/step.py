"""Step time of routed training (uniform, 0.5) over standard training of the same model: at most 1 on one stage.

    skvr-bench step
    deepspeed --num_gpus 2 tools/bench.py step --json bench.json parallel.pipeline=2
    skvr-bench step --config bench --config qwen3-1.7b --least-mfu 0.55 train.precision=bf16 data.sequence_length=4096 \
        train.micro_batch_size=1

Keys and values that nobody reads are not computed, so routing should cost nothing. On a GPU tokens per second, MFU and
memory are printed too (docs/metrics.md). Exit code 1: the median ratio is above the bound (`--bound`), or an MFU below
`--least-mfu`.
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

if TYPE_CHECKING:
    from skvr_dist.lab.bench.step import StepTimes


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser, default="bench")
    parser.add_argument("--rounds", type=at_least(2), default=40, help="steps of each kind (default: 40)")
    add_bound(parser, 1.0, "largest ratio allowed")
    parser.add_argument(
        "--least-mfu", type=share, metavar="X", help="least MFU allowed, of both kinds of steps; on GPUs"
    )
    add_json(parser)
    add_overrides(parser)


def run(options: Namespace) -> int:
    """Measure, over all ranks; returns the exit code."""
    import torch

    from skvr_dist.cluster.launcher import announced_world_size
    from skvr_dist.config.layouts import data_parallel_size
    from skvr_dist.config.load import load_config
    from skvr_dist.parallel.engine.process_group import start_process_group

    config = load_config(options.config, options.overrides)
    data_parallel_size(config, announced_world_size())

    from skvr_dist.lab.bench.step import Ratio, interleaved_step_times
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.routing import RoutingConfig
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.usage import memory_of_rank

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    routings = [RoutingConfig(policy="none"), RoutingConfig(policy="uniform", cross_layer_prob=0.5)]
    standard, routed = interleaved_step_times(config, engine, mesh, routings, options.rounds)
    ratio = Ratio.of(routed, standard)
    figure = Figure(
        f"routed / standard: {ratio.median:.3f} (quartiles {ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f}, "
        f"{options.rounds} pairs, {mesh.pp_size} stages x {mesh.dp_size} replicas)",
        f"{options.bound:.2f}",
        ratio.median <= options.bound,
    )
    figures = [figure]
    if options.least_mfu is not None:
        figures += [_mfu_figure(times, options.least_mfu) for times in (standard, routed)]
    if mesh.rank != 0:
        return exit_code_of(figures)
    tokens = config.train.global_batch_size * config.data.sequence_length
    record: dict[str, object] = {"ratio": ratio, "bound": options.bound, "tokens": tokens}
    record |= {"stages": mesh.pp_size, "replicas": mesh.dp_size}
    record |= {"standard": standard.seconds, "routed": routed.seconds}
    memory = memory_of_rank(mesh.devices.device_type == "cuda").get("allocated_peak_gib")
    if memory is not None:
        record |= {"mfu": [standard.mfu, routed.mfu], "peak_gib": memory, "device": torch.cuda.get_device_name()}
    table = _table([standard, routed], tokens, memory)
    return conclude(figures, table=table, record=record, json_file=options.json)


def _table(kinds: Sequence[StepTimes], tokens: int, memory: float | None) -> str:
    """A row for each kind of step.

    Args:
        tokens: of a step.
        memory: the most GiB that this rank's GPU held; None on CPUs.
    """
    headers = ["routing", "median step (ms)", "K/V projections skipped", "tokens/s"]
    rows = [
        [
            each.routing.policy,
            f"{1e3 * each.median:.1f}",
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
    return Figure(f"MFU of {times.routing.policy}: {mfu:.1%}", f"{least:.0%}", mfu >= least)
