"""What an asynchronous save costs the steps that run while it writes: at most 5 % of their time. And its bandwidth.

    skvr-bench save
    deepspeed --num_gpus 2 tools/bench.py save --json save.json parallel.pipeline=2

The steps that a save touches are timed against the one before and the one after it, again and again. Saving and
loading are also timed alone, against copying a checkpoint's files with the operating system. Exit code 1: the median
ratio is above the bound (`--bound`).
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import (
    Figure,
    a_path,
    add_bound,
    add_configs,
    add_json,
    add_overrides,
    at_least,
    conclude,
    exit_code_of,
)
from skvr_dist.errors import UserError
from skvr_dist.files import prove_folder

if TYPE_CHECKING:
    from skvr_dist.lab.bench.save import SavingCost


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser, default="bench-checkpoint")
    parser.add_argument("--saves", type=at_least(2), default=12, help="saves (default: 12)")
    add_bound(parser, 1.05, "largest ratio allowed")
    parser.add_argument("--folder", type=a_path, help="where to write (default: a temporary folder; one host only)")
    add_json(parser)
    add_overrides(parser)


def run(options: Namespace) -> int:
    """Measure, over all ranks; returns the exit code."""
    if options.folder is not None:
        options.folder = prove_folder(options.folder)
        if not options.folder.is_dir():
            raise UserError(
                f"--folder {options.folder} is not there; make it first, on the disk that is to be measured"
            )

    from skvr_dist.cluster.launcher import announced_world_size
    from skvr_dist.config.load import load_config
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.train.inputs import require_startable

    config = load_config(options.config, options.overrides)
    require_startable(config, announced_world_size())

    from skvr_dist.lab.bench.save import saving_cost
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(mesh.host_group.from_first(own))
        cost = saving_cost(config, engine, mesh, folder, options.saves)
        mesh.host_group.sum([0.0])  # nobody removes the folder while another rank still reads
    figure = Figure(
        f"step while a save writes / step without: {cost.ratio.median:.3f} (quartiles "
        f"{cost.ratio.lower_quartile:.3f} to {cost.ratio.upper_quartile:.3f}, {cost.saves} saves)",
        f"{options.bound:.2f}",
        cost.ratio.median <= options.bound,
    )
    if mesh.rank != 0:
        return exit_code_of([figure])
    return conclude([figure], table=_table(cost), record=cost, json_file=options.json)


def _table(cost: SavingCost) -> str:
    megabytes = cost.bytes / 1e6
    rows = [
        ["state", f"{megabytes:.0f} MB in {cost.files} files"],
        ["copying it to the host, while training stands", f"{1e3 * cost.copy_seconds:.0f} ms"],
        ["saving alone, hashed and published", f"{megabytes / cost.save_seconds:.0f} MB/s"],
        ["loading", f"{megabytes / cost.load_seconds:.0f} MB/s"],
        ["copying the files", f"{megabytes / cost.plain_copy_seconds:.0f} MB/s"],
        ["steps that a save touches, the mean", f"{cost.steps_touched:.1f}"],
    ]
    return tabulate(rows, tablefmt="github")
