"""What an asynchronous save costs the steps that run while it writes: at most 5 % of their time. And its bandwidth.

    python tools/bench_checkpoint.py
    deepspeed --num_gpus 2 tools/bench_checkpoint.py --json checkpoint.json parallel.pipeline=2

The steps that a save touches are timed against the one before and the one after it, again and again. Saving and
loading are also timed alone, against copying a checkpoint's files with the operating system. Exit code 1: the median
ratio is above the bound (`--bound`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from skvr_dist.cluster.launcher import announced_world_size
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import load_config
from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.parallel.engine.process_group import start_process_group


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/experiment/bench-checkpoint.yaml", metavar="FILE")
    parser.add_argument("--saves", type=int, default=12, help="saves (default: 12)")
    parser.add_argument("--bound", type=float, default=1.05, help="largest ratio allowed (default: 1.05)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder; one host only)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config([options.config], options.overrides)
    data_parallel_size(config, announced_world_size())

    from skvr_dist.lab.bench.save import saving_cost
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = Path(mesh.from_first_rank(own))
        cost = saving_cost(config, engine, mesh, folder, options.saves)
        mesh.sum_over_ranks([0.0])  # nobody removes the folder while another rank still reads
    passed = cost.ratio.median <= options.bound
    if mesh.rank == 0:
        megabytes = cost.bytes / 1e6
        rows = [
            ["state", f"{megabytes:.0f} MB in {cost.files} files"],
            ["copying it to the host, while training stands", f"{1e3 * cost.copy_seconds:.0f} ms"],
            ["saving alone, hashed and published", f"{megabytes / cost.save_seconds:.0f} MB/s"],
            ["loading", f"{megabytes / cost.load_seconds:.0f} MB/s"],
            ["copying the files", f"{megabytes / cost.plain_copy_seconds:.0f} MB/s"],
            ["steps that a save touches, the mean", f"{cost.steps_touched:.1f}"],
        ]
        print(tabulate(rows, tablefmt="github"))
        print(
            f"\nstep while a save writes / step without: {cost.ratio.median:.3f} (quartiles "
            f"{cost.ratio.lower_quartile:.3f} to {cost.ratio.upper_quartile:.3f}, {cost.saves} saves); bound "
            f"{options.bound:.2f}: {'met' if passed else 'missed'}"
        )
        if options.json:
            options.json.write_text(json.dumps(asdict(cost), indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


if __name__ == "__main__":
    run_command(main)
