"""Find out whether hosts can run together, before anything starts on them.

    python tools/preflight.py --hostfile launch/hostfile --config quickstart train.output_dir=runs/mine
    python tools/preflight.py --config quickstart train.output_dir=runs/mine     (in an allocation of Slurm)

Starts a probe on every host, over ssh or by srun, and compares: reached by name, Python, packages, code and
configuration, devices and memory, the interface and address that ranks will use, the port, the run's folder (written
by each, read by all), clocks, a sum over all hosts, and messages between every two, timed. Nothing is left running.
Exits 2 with the names of the hosts where something has to be put right.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import a_path, add_json, add_overrides, at_least, new_parser, parse, run_command, write_json
from skvr_dist.errors import UserError
from skvr_dist.files import prove_folder, write_whole

if TYPE_CHECKING:
    from skvr_dist.cluster.preflight.checks import Findings

_PORT = 29500  # DeepSpeed's


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Ask the hosts, print the table and the verdict.

    Raises:
        UserError: something has to be put right.
    """
    options = parse(_parser())
    options.hostfile, options.port = _only(options, "hostfile"), _only(options, "port")
    hosts, slots, over, port = _hosts(options)
    words, folder = _configuration(options)
    settled = prove_folder(options.settle) if options.settle else None

    from skvr_dist.cluster.launcher import HOSTS_VARIABLE
    from skvr_dist.cluster.preflight.checks import examine
    from skvr_dist.cluster.preflight.remote import Remotes
    from skvr_dist.cluster.variables import in_words, passed_variables

    variables = passed_variables(also=options.passed)
    with Remotes(hosts, variables, over) as remotes:
        found = examine(remotes, hosts, words, folder, port, slots)
    _print(found)
    print(f"variables that all ranks get: {in_words(variables)}")
    if options.json:
        write_json(options.json, found)
    if found.problems:
        raise UserError("; ".join(found.problems))
    if settled:
        _settle(settled, found, {**variables, HOSTS_VARIABLE: ",".join(hosts)}, options)
    print(
        f"{len(hosts)} hosts of {slots} ranks can run together; they meet at {found.address}"
        + (f":{port}" if over == "ssh" else ", each step at a port of its own")
    )


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--hostfile", action="append", type=a_path, metavar="FILE", help="of deepspeed; by default Slurm's allocation"
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="as of the run; without, hosts alone")
    parser.set_defaults(default_config=None)
    parser.add_argument(
        "--from", dest="start", type=a_path, metavar="CHECKPOINT", help="that a run of launch/finetune.py starts from"
    )
    parser.add_argument(
        "--port",
        action="append",
        type=at_least(1, 2**16 - 1),
        metavar="N",
        help="where ranks meet (default: 29500, or Slurm's job has its own)",
    )
    parser.add_argument(
        "--pass", dest="passed", action="append", default=[], metavar="NAME", help="pass this variable too"
    )
    parser.add_argument("--settle", metavar="FOLDER", help="write what the scripts of launch/ need there")
    add_overrides(parser)
    add_json(parser, "write all that was found there")
    return parser


def _only(options: argparse.Namespace, name: str) -> Any:
    """What an option is given; twice is refused, for a script of launch/ gives one of the two to the launcher.

    Raises:
        UserError: it is given twice.
    """
    given = getattr(options, name) or [None]
    if len(given) > 1:
        raise UserError(
            f"--{name} is {given[0]} and {given[-1]}; give one, to a script of launch/ as {name.upper()}={given[-1]} "
            f"before it"
        )
    return given[0]


def _hosts(options: argparse.Namespace) -> tuple[list[str], int, str, int]:
    """The hosts, the ranks of each, what reaches them, and the port where ranks meet."""
    from skvr_dist.cluster.hostfile import read_hostfile
    from skvr_dist.cluster.slurm import allocation

    if options.hostfile:
        hosts, slots = read_hostfile(options.hostfile)
        if options.settle and len(hosts) > 1 and shutil.which("pdsh") is None:
            raise UserError(
                "pdsh is not installed here, with which deepspeed starts hosts; install Debian's package pdsh"
            )
        return hosts, slots, "ssh", options.port or _PORT
    if (given := allocation()) is None:
        raise UserError("no --hostfile is given, and this is no allocation of Slurm; give one of them")
    hosts, slots, port = given
    return hosts, slots, "srun", options.port or port


def _configuration(options: argparse.Namespace) -> tuple[list[str], str]:
    """What the probes read the configuration from, and the run's folder; both empty without a configuration."""
    if not options.config:
        if options.start:
            raise UserError(f"--from {options.start} is given, but no --config; give the run's")
        if options.overrides:
            raise UserError(f"{options.overrides[0]} overrides a key, but no --config is given; give the run's")
        return [], ""
    from skvr_dist.checkpoint.base import base_of
    from skvr_dist.config.load import load_config
    from skvr_dist.files import local_path

    config = load_config(options.config, options.overrides, base=base_of(options.start) if options.start else None)
    folder = str(local_path(config.train.output_dir).absolute())
    return [*_start(options), *map(str, options.config), "--", *options.overrides], folder


def _start(options: argparse.Namespace) -> list[str]:
    return ["--from", str(options.start)] if options.start else []


def _print(found: Findings) -> None:
    from skvr_dist.cluster.preflight.checks import as_rows

    rows = as_rows(found)
    print(tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github"))
    if found.pairs:
        pairs = [
            [pair.first, pair.second, f"{pair.latency_seconds * 1e6:.0f} us", f"{pair.bytes_per_second / 1e6:.0f} MB/s"]
            for pair in found.pairs
        ]
        print("\n" + tabulate(pairs, headers=["host", "and", "latency", "one way"], tablefmt="github"))
    print()
    for note in found.notes:
        print(f"note: {note}")


def _settle(folder: Path, found: Findings, variables: dict[str, str], options: argparse.Namespace) -> None:
    """Write where to meet and the run's folder, and what the launcher is given: variables, and arguments as a word."""
    from skvr_dist.cluster.arguments import pack
    from skvr_dist.cluster.variables import as_deepspeed_file

    folder.mkdir(parents=True, exist_ok=True)
    configs = [word for file in options.config for word in ("--config", str(file))]
    write_whole(folder / "address", found.address + "\n")
    write_whole(folder / "run", found.facts[found.hosts[0]]["folder"] + "\n")
    write_whole(folder / "environment", as_deepspeed_file(variables))
    write_whole(folder / "arguments", pack([*_start(options), *configs, *options.overrides]) + "\n")


if __name__ == "__main__":
    main()
