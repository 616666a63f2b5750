"""Pretrain a decoder with stochastic KV routing.

    deepspeed --num_gpus 4 launch/pretrain.py --config quickstart train.steps=100
    deepspeed --num_gpus 4 --module skvr_dist.commands.pretrain --config quickstart train.steps=100

`--config` is a YAML file or the name of a preset, and may be given several times, later ones win;
`section.key=value` overrides a key. Also starts under torchrun, mpirun and srun; docs/launch.md has several hosts.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from skvr_dist.command import add_configs, add_overrides, at_least, new_parser, parse, run_command
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.config.tree import Config


def main() -> None:
    """Entry point."""
    run_command(run, over_ranks=True)


def run() -> None:
    """Train, or show what would be trained."""
    options = parse(training_parser(__doc__))

    from skvr_dist.config.load import load_config

    train_as_asked(options, load_config(options.config, options.overrides))


def training_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments of every command that trains."""
    parser = new_parser(doc)
    add_configs(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the layout and stop")
    parser.add_argument("--world-size", type=at_least(1), metavar="N", help="ranks to assume in a dry run")
    add_overrides(parser)
    return parser


def train_as_asked(options: argparse.Namespace, config: Config) -> None:
    """Train, or print what the options ask for instead."""
    if options.print_config:
        from skvr_dist.config.load import dump_config

        print(dump_config(config), end="")
        return
    if options.world_size and not options.dry_run:
        raise UserError("--world-size is for --dry-run; a launcher says how many ranks there are")
    if options.dry_run:
        from skvr_dist.cluster.launcher import announced_world_size
        from skvr_dist.train.dry_run import describe

        print(describe(config, options.world_size or announced_world_size()))
        return

    from skvr_dist.cluster.hostfile import require_hostfile_of_launcher
    from skvr_dist.train.loop import pretrain

    require_hostfile_of_launcher()
    pretrain(config)


if __name__ == "__main__":
    main()
