"""Pretrain a decoder with stochastic KV routing.

    deepspeed --num_gpus 4 launch/pretrain.py --config configs/experiment/quickstart.yaml train.steps=100

`--config` may be given several times, later files win; `section.key=value` overrides a key. Also starts under
torchrun and mpirun.
"""

from __future__ import annotations

import argparse

from skvr_dist.cluster.launcher import announced_world_size
from skvr_dist.config.load import dump_config, load_config
from skvr_dist.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the layout and stop")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to assume in a dry run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()

    config = load_config(options.config, options.overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return
    if options.dry_run:
        from skvr_dist.train.dry_run import describe

        print(describe(config, options.world_size or announced_world_size()))
        return

    from skvr_dist.train.loop import pretrain

    pretrain(config)


if __name__ == "__main__":
    run_command(main)
