"""Trace a few training steps of a configuration: what each rank does when, for Perfetto and chrome://tracing.

    skvr-profile --config quickstart --output traces
    deepspeed --num_gpus 2 tools/profile_steps.py --config quickstart --output traces parallel.pipeline=2

Trains with the run's own data, plans and layout, from new weights, and writes nothing of a run: train.output_dir stays
as it is. Each rank writes OUTPUT/rank-NNNNN.json.gz, which https://ui.perfetto.dev and chrome://tracing open as it is.
The table has the seconds of a step's parts, which the profiler makes a little longer.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import (
    a_path,
    add_configs,
    add_json,
    add_overrides,
    at_least,
    new_parser,
    parse,
    run_command,
    write_json,
)
from skvr_dist.files import prove_folder

if TYPE_CHECKING:
    from skvr_dist.lab.profile_steps import RankProfile


def main() -> None:
    """Entry point."""
    run_command(lambda: run(parse(new_arguments(), over_ranks=True)), over_ranks=True)


def new_arguments() -> ArgumentParser:
    """The parser of the command line."""
    parser = new_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--steps", type=at_least(1, 1000), default=3, help="steps to trace (default: 3)")
    parser.add_argument("--warmup", type=at_least(1), default=2, help="steps before them (default: 2)")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER", help="where the traces go")
    add_json(parser)
    add_overrides(parser)
    return parser


def run(options: Namespace) -> None:
    """Train and trace, over all ranks."""
    prove_folder(options.output)

    from skvr_dist.cluster.launcher import announced_world_size
    from skvr_dist.config.load import load_config
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.train.inputs import open_inputs

    config = load_config(options.config, options.overrides)
    inputs = open_inputs(config, announced_world_size())

    from skvr_dist.lab.profile_steps import profile_steps
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.batches import WatchedBatches, open_reader, training_batches
    from skvr_dist.train.build import build_engine

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    reader = open_reader(config, inputs.sequences, mesh)
    engine = build_engine(config, mesh)
    batches = training_batches(config, reader, mesh, first_step=0)
    found = profile_steps(
        config,
        engine,
        mesh,
        WatchedBatches(batches, logging.getLogger("skvr_dist")),
        warmup=options.warmup,
        steps=options.steps,
        folder=options.output,
    )
    if mesh.rank == 0:
        print(as_table(found))
        if options.json is not None:
            write_json(options.json, {"steps": options.steps, "warmup": options.warmup, "ranks": found})


def as_table(ranks: list[RankProfile]) -> str:
    """A line for each rank: milliseconds of a step and of its parts, and its trace."""
    header = ["rank", "stage", "step (ms)", *ranks[0].parts, "trace"]
    rows = []
    for each in ranks:
        times = [f"{1e3 * seconds:.1f}" for seconds in (each.step_seconds, *each.parts.values())]
        rows.append([each.rank, each.stage, *times, each.file])
    return tabulate(rows, headers=header, tablefmt="github")


if __name__ == "__main__":
    main()
