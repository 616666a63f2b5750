"""Step time of routed training (uniform, 0.5) over standard training of the same model: at most 1 on one stage.

    skvr-bench step
    deepspeed --num_gpus 2 tools/bench.py step --json bench.json parallel.pipeline=2

Keys and values that nobody reads are not computed, so routing should cost nothing. Exit code 1: the median ratio is
above the bound (`--bound`).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

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
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser, default="bench")
    parser.add_argument("--rounds", type=at_least(2), default=40, help="steps of each kind (default: 40)")
    add_bound(parser, 1.0, "largest ratio allowed")
    add_json(parser)
    add_overrides(parser)


def run(options: Namespace) -> int:
    """Measure, over all ranks; returns the exit code."""
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
    if mesh.rank != 0:
        return exit_code_of([figure])
    rows = [
        [times.routing.policy, f"{1e3 * times.median:.1f}", f"{times.skipped_kv_share:.0%}"]
        for times in (standard, routed)
    ]
    table = tabulate(rows, headers=["routing", "median step (ms)", "K/V projections skipped"], tablefmt="github")
    record = {"ratio": ratio, "bound": options.bound, "stages": mesh.pp_size, "replicas": mesh.dp_size}
    record |= {"standard": standard.seconds, "routed": routed.seconds}
    return conclude([figure], table=table, record=record, json_file=options.json)
