"""Step time of routed training (uniform, 0.5) over standard training of the same model: at most 1 on one stage.

    python tools/bench.py
    deepspeed --num_gpus 2 tools/bench.py --json bench.json parallel.pipeline=2

Keys and values that nobody reads are not computed, so routing should cost nothing. Exit code 1: the median ratio is
above the bound (`--bound`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from skvr_dist.cluster.launcher import announced_world_size
from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.load import load_config
from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.parallel.engine.process_group import start_process_group
from skvr_dist.routing import RoutingConfig

STANDARD = RoutingConfig(policy="none")
ROUTED = RoutingConfig(policy="uniform", cross_layer_prob=0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/experiment/bench.yaml", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind (default: 40)")
    parser.add_argument("--bound", type=float, default=1.0, help="largest ratio allowed (default: 1.0)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config([options.config], options.overrides)
    data_parallel_size(config, announced_world_size())

    from skvr_dist.lab.bench.step import Ratio, interleaved_step_times
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    start_process_group()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    standard, routed = interleaved_step_times(config, engine, mesh, [STANDARD, ROUTED], options.rounds)
    ratio = Ratio.of(routed, standard)
    passed = ratio.median <= options.bound
    if mesh.rank == 0:
        rows = [
            [times.routing.policy, f"{1e3 * times.median:.1f}", f"{times.skipped_kv_share:.0%}"]
            for times in (standard, routed)
        ]
        print(tabulate(rows, headers=["routing", "median step (ms)", "K/V projections skipped"], tablefmt="github"))
        print(
            f"\nrouted / standard: {ratio.median:.3f} (quartiles {ratio.lower_quartile:.3f} to "
            f"{ratio.upper_quartile:.3f}, {options.rounds} pairs, {mesh.pp_size} stages x {mesh.dp_size} replicas); "
            f"bound {options.bound:.2f}: {'met' if passed else 'missed'}"
        )
        if options.json:
            record = {"ratio": asdict(ratio), "bound": options.bound, "stages": mesh.pp_size, "replicas": mesh.dp_size}
            record |= {"standard": asdict(standard)["seconds"], "routed": asdict(routed)["seconds"]}
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else EXIT_MISSED


if __name__ == "__main__":
    run_command(main)
