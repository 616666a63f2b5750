"""Pretrain a decoder with stochastic KV routing.

    deepspeed --num_gpus 4 launch/pretrain.py --config quickstart train.steps=100
    deepspeed --num_gpus 4 --module skvr_dist.commands.pretrain --config quickstart train.steps=100

`--config` is a YAML file or the name of a preset, and may be given several times, later ones win;
`section.key=value` overrides a key. Also starts under torchrun and mpirun.
"""

from __future__ import annotations

from skvr_dist.command import add_configs, add_overrides, at_least, new_parser, parse, run_command
from skvr_dist.errors import RunInterrupted


def main() -> None:
    """Entry point."""
    run_command(run, over_ranks=True)


def run() -> None:
    """Train, or show what would be trained."""
    parser = new_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the layout and stop")
    parser.add_argument("--world-size", type=at_least(1), metavar="N", help="ranks to assume in a dry run")
    add_overrides(parser)
    options = parse(parser)

    from skvr_dist.cluster.launcher import announced_world_size
    from skvr_dist.config.load import dump_config, load_config

    config = load_config(options.config, options.overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return
    if options.dry_run:
        from skvr_dist.train.dry_run import describe

        print(describe(config, options.world_size or announced_world_size()))
        return

    from skvr_dist.train.loop import pretrain

    try:
        pretrain(config)
    except RuntimeError as error:
        # torch raises it wherever the rank is at that moment. DeepSpeed's launcher ends a rank's children with the rank
        # when it gets Ctrl-C or SIGTERM itself; a host that runs out of memory does so too.
        if "DataLoader worker" not in str(error):
            raise
        raise RunInterrupted(
            f"a process that reads data ahead was ended ({' '.join(str(error).split())}); start the run again, it goes "
            f"on from its latest checkpoint"
        ) from None


if __name__ == "__main__":
    main()
