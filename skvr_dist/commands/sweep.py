"""Train the runs of an experiment: a grid or a list, with several seeds, and branches off them.

    skvr-sweep configs/experiment/sweeps/recipes.yaml
    skvr-sweep recipes.yaml --place print
    skvr-sweep recipes.yaml --seed 0 --output-dir runs/try --try-steps 4

Each run has a folder of its own in the experiment's `output_dir`. Runs that are finished are left alone and others go
on from their newest checkpoint, so the same command continues a sweep that was ended or killed. When a run fails the
others go on; the exit code is 1 then. `section.key=value` overrides a key of all runs; --try-steps tries a file out.
results.jsonl holds a line per run with its losses. docs/experiments.md has the keys of an experiment.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from skvr_dist.command import a_path, add_overrides, at_least, new_parser, parse, run_command
from skvr_dist.errors import EXIT_MISSED, RunInterrupted

if TYPE_CHECKING:
    from skvr_dist.sweep.experiment import Experiment
    from skvr_dist.sweep.folder import SweepFolder
    from skvr_dist.sweep.places import Machine
    from skvr_dist.sweep.plan import PlannedRun

_PLACES = ("local", "slurm", "print")


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Plan the runs, and run those that are not finished; returns the exit code."""
    options = _options()
    from skvr_dist.run.lock import RunLock
    from skvr_dist.sweep.folder import SweepFolder
    from skvr_dist.sweep.plan import plan_runs, require_no_axis

    name, experiment = options.experiment.stem, _experiment(options)
    require_no_axis(experiment, options.overrides)
    runs, folder = plan_runs(experiment, options.overrides), SweepFolder(experiment.output_dir)
    folder.require_of(name, runs)
    lock = RunLock(folder.path, name)
    folder.prepare(name, runs)
    code = 0
    if experiment.place.kind == "print":
        _print_commands(runs, experiment.place.ranks)
    else:
        code = _sweep(experiment, runs, folder, keeps_other_seeds=bool(options.seed))
    lock.release()
    return code


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("experiment", type=a_path, metavar="EXPERIMENT", help="a YAML file")
    parser.add_argument("--output-dir", metavar="FOLDER", help="instead of the experiment's output_dir")
    parser.add_argument("--place", choices=_PLACES, help="where to run, instead of place.kind")
    parser.add_argument("--at-once", type=at_least(1), metavar="N", help="runs at a time, instead of place.at_once")
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="instead of seeds; may be repeated")
    parser.add_argument("--try-steps", type=at_least(4), metavar="N", help="runs and branches of N steps each")
    add_overrides(parser)
    return parse(parser)


def _experiment(options: argparse.Namespace) -> Experiment:
    """The experiment as its file and the command line have it."""
    from skvr_dist.sweep.experiment import read_experiment, shortened

    experiment = read_experiment(options.experiment)
    if options.try_steps:
        experiment = shortened(experiment, options.try_steps)
    place = {"kind": options.place, "at_once": options.at_once}
    update = {"output_dir": options.output_dir, "seeds": options.seed}
    changed = {key: value for key, value in update.items() if value is not None}
    changed["place"] = experiment.place.model_copy(update={key: value for key, value in place.items() if value})
    return experiment.model_copy(update=changed)


def _print_commands(runs: Sequence[PlannedRun], ranks: int) -> None:
    """Print a command for each run that is not finished; that of a branch comes after its trunk's."""
    from skvr_dist.sweep.ranks import pretrain_command

    launcher = [] if ranks == 1 else ["deepspeed", "--num_gpus", str(ranks)]
    for planned in runs:
        if not planned.is_finished():
            python, *arguments = pretrain_command(planned.folder.config)
            module = [python, *arguments] if ranks == 1 else ["--module", *arguments[1:]]
            print(shlex.join([*launcher, *module]))


def _sweep(experiment: Experiment, runs: Sequence[PlannedRun], folder: SweepFolder, *, keeps_other_seeds: bool) -> int:
    """Run what is not finished; returns the exit code.

    Raises:
        RunInterrupted: a signal has ended it.
    """
    from skvr_dist.sweep.board import Board
    from skvr_dist.sweep.loop import Sweep
    from skvr_dist.sweep.results import Results, source_commit

    machine, board = _machine(experiment, folder), Board()
    sweep = Sweep(
        runs,
        machine,
        Results(folder.results, keeps_other_seeds=keeps_other_seeds),
        retries=experiment.place.retries,
        commit=source_commit(),
        show=board.show,
    )
    ended_by = sweep.run()
    board.close(sweep.statuses)
    print(f"\nresults: {folder.results}")
    failed = [status for status in sweep.statuses if status.state == "failed"]
    for status in failed:
        print(f"failed: {status.run.name}: {status.error}")
    if ended_by:
        finished = sum(status.state == "finished" for status in sweep.statuses)
        raise RunInterrupted(
            f"{ended_by} ended the sweep with {finished} of {len(runs)} runs finished; start it again, it goes on"
        )
    return EXIT_MISSED if failed else 0


def _machine(experiment: Experiment, folder: SweepFolder) -> Machine:
    from skvr_dist.sweep.places import ThisMachine
    from skvr_dist.sweep.slurm import Slurm

    if experiment.place.kind == "slurm":
        return Slurm(experiment.place, folder.slurm)
    return ThisMachine(experiment.place, folder.path)


if __name__ == "__main__":
    main()
