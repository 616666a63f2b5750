"""Start a run again when it ends before its last step: ranks die, hosts vanish, jobs are preempted.

    skvr-keep-running --output-dir runs/mine -- deepspeed --num_gpus 4 --module skvr_dist.commands.pretrain \\
        --config quickstart train.output_dir=runs/mine

    skvr-keep-running --hostfile hosts --output-dir runs/mine -- launch/pretrain.py --config quickstart \\
        train.output_dir=runs/mine

The first keeps a launcher on this host running. With --hostfile (`NAME slots=N` a line, the first is this host) or
--ranks no launcher is needed: an agent on each host starts its ranks, hosts that are lost are left out, and the run
goes on with the others. --ranks alone is for this host, or for what starts this command once per host, as srun does.

The run resumes from its latest checkpoint. SIGTERM, SIGUSR1, Ctrl+C and the end of the terminal are passed to the
ranks, which save and end; after that the run is not started again (exit code 75). A mistake of the user's (exit code 2)
ends it at once.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skvr_dist.command import a_path, at_least, new_parser, run_command
from skvr_dist.errors import UserError
from skvr_dist.files import local_path

if TYPE_CHECKING:
    from skvr_dist.cluster.hosts_of_run import HostOfRun

_LAUNCHERS = ("deepspeed", "ds", "torchrun", "mpirun", "mpiexec", "srun")


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Start the command until its run has finished; returns the exit code of the last attempt."""
    parser = new_parser(__doc__)
    parser.add_argument("--output-dir", type=a_path, required=True, metavar="FOLDER", help="the run's train.output_dir")
    parser.add_argument(
        "--restarts", type=at_least(0), default=3, metavar="N", help="without a new checkpoint between (default: 3)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--hostfile", type=a_path, metavar="FILE", help="hosts to start over ssh, with ranks on each")
    where.add_argument("--ranks", type=at_least(1), metavar="N", help="ranks on each host")
    parser.add_argument(
        "--patience",
        type=at_least(2),
        default=20,
        metavar="SECONDS",
        help="without a sign of life of a host, after which it is lost (default: 20)",
    )
    parser.add_argument(
        "--on-hosts",
        nargs=2,
        action="append",
        default=[],
        metavar=("N", "KEY=VALUE"),
        help="a key to override while there are N hosts, such as another layout; repeated",
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="a launcher's line, or a rank's, after --")
    options = parser.parse_args()  # in this order: what follows -- is another command's
    _refuse_another_folder(options.command, options.output_dir)
    if options.hostfile is None and options.ranks is None:
        from skvr_dist.cluster.keep_running import KeptRun

        _refuse_other_hosts(options.command)
        return KeptRun(options.command, options.output_dir, options.restarts).run()
    _refuse_a_launcher(options)
    return _supervise(options)


def _refuse_another_folder(command: Sequence[str], output_dir: Path) -> None:
    """Refuse to watch another folder than the command trains in, if it names one.

    Raises:
        UserError: both of them.
    """
    words = [word for word in command if word.startswith("train.output_dir=")]
    if words and local_path(words[-1].partition("=")[2]).resolve() != output_dir.resolve():
        raise UserError(f"--output-dir is {output_dir}, but the command has {words[-1]}; give both the same folder")


def _refuse_other_hosts(command: Sequence[str]) -> None:
    """Refuse a launcher of several hosts.

    Raises:
        UserError: it is one; its ranks on other hosts would get no signal, and be left when it dies.
    """
    from skvr_dist.cluster.hostfile import hostfile_among, read_hostfile

    given = hostfile_among(command)
    if given is None or not Path(given).exists():
        return
    names, _ = read_hostfile(Path(given))
    if len(names) > 1:
        raise UserError(
            f"{command[0]} --hostfile {given} starts ranks on {len(names)} hosts, of which only those of this one "
            f"would be kept; give --hostfile {given} before the --, and launch/pretrain.py after it"
        )


def _refuse_a_launcher(options: argparse.Namespace) -> None:
    """Refuse a launcher where the ranks are started here: each of them would start all ranks of its own.

    Raises:
        UserError: the command is one, or a script of launch/ around it.
    """
    launcher = options.command[0]
    if Path(launcher).stem in _LAUNCHERS:
        given = f"--hostfile {options.hostfile}" if options.hostfile else f"--ranks {options.ranks}"
        raise UserError(
            f"{given} starts the ranks without a launcher, and {launcher} would start more on each of them; give "
            f"launch/pretrain.py and its arguments after --, or leave {given} away"
        )


def _supervise(options: argparse.Namespace) -> int:
    """Be the supervisor of a run, or the agent of a host that is not the first."""
    from skvr_dist.cluster.agent import Agent
    from skvr_dist.cluster.hosts_of_run import hosts_of_file
    from skvr_dist.cluster.launcher import adopt_slurm_tasks, announced_rank
    from skvr_dist.cluster.processes import say
    from skvr_dist.cluster.supervisor import Supervisor
    from skvr_dist.cluster.variables import in_words, passed_variables
    from skvr_dist.run.folder import RunFolder

    adopt_slurm_tasks()
    if options.hostfile is None and announced_rank() > 0:
        return Agent(RunFolder(options.output_dir), announced_rank(), socket.gethostname()).run()
    hosts = hosts_of_file(options.hostfile) if options.hostfile else _announced_hosts(options.ranks)
    carried = passed_variables() if options.hostfile else {}
    if carried:
        say(f"passed to the ranks of all hosts: {in_words(carried)}")
    return Supervisor(
        _of_a_rank(options.command),
        options.output_dir,
        hosts,
        restarts=options.restarts,
        patience_seconds=options.patience,
        overrides=_by_hosts(options.on_hosts),
        carried=carried,
    ).run()


def _announced_hosts(ranks: int) -> list[HostOfRun]:
    """This host, and as many others as whatever started this command has announced."""
    from skvr_dist.cluster.hosts_of_run import HostOfRun, is_this_host
    from skvr_dist.cluster.launcher import announced_world_size

    first = socket.gethostname()
    if announced_world_size() > 1:
        first = os.environ.get("MASTER_ADDR", first)
    elif not is_this_host(first):  # containers may not know their own name
        first = "localhost"
    others = [HostOfRun(index, "", ranks, started_by="others") for index in range(1, announced_world_size())]
    return [HostOfRun(0, first, ranks), *others]


def _of_a_rank(command: Sequence[str]) -> list[str]:
    """The command line of a rank; a Python file is run by this Python."""
    return [sys.executable, "-u", *command] if Path(command[0]).suffix == ".py" else list(command)


def _by_hosts(pairs: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for number, override in pairs:
        if not number.isdecimal() or "=" not in override:
            raise UserError(f"--on-hosts {number} {override} is no number of hosts and a KEY=VALUE")
        found.setdefault(int(number), []).append(override)
    return found


if __name__ == "__main__":
    main()
