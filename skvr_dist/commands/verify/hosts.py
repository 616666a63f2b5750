"""Start runs on several hosts in every way, and do to them what clusters do; hosts are namespaces of this machine.

    skvr-verify hosts --json hosts.json
    skvr-verify hosts --only power_off
    skvr-verify hosts --json hosts.json --resume --output hosts.md

Needs root's rights and Debian's packages iproute2, openssh-server, pdsh, openmpi-bin, slurmctld, slurmd, slurm-client
and munge. Exits 1 when a case does not end as it must.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import Figure, add_json, conclude, write_json
from skvr_dist.errors import UserError
from skvr_dist.files import prove_writable, write_whole

if TYPE_CHECKING:
    from skvr_dist.lab.hosts.case import Case, Outcome

_TITLES = {"start": "Starts", "input": "Bad input", "fault": "Faults"}
_PAGE = """\
# Several hosts: every start, every mistake, every fault, {date}

Hosts are namespaces of one machine with an address, a name and an sshd each (`skvr_dist/lab/hosts`); ranks,
launchers, ssh and Slurm are the real ones. A small decoder trains on CPUs; its losses must be those of as many ranks
on one machine, to the bit. Seconds include the start of the hosts and of Python, PyTorch and DeepSpeed on each.

    python tools/verify.py hosts --output {output} --json hosts.json

Commit `{commit}`; {machine}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--only", metavar="PATTERN", help="cases in whose name a regular expression is found")
    parser.add_argument("--quick", action="store_true", help="the few cases that the tests play")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--resume", action="store_true", help="keep the cases in --json FILE that ended well")
    parser.add_argument("--output", metavar="FILE", help="write the tables there, as a page in Markdown")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Play the cases and report; returns the exit code."""
    from tqdm import tqdm

    from skvr_dist.lab.hosts.case import Lab, play
    from skvr_dist.lab.hosts.namespaces import why_not

    cases = _chosen(options)
    if options.list:
        print(tabulate([[case.name, case.kind, case.what] for case in cases], tablefmt="plain"))
        return 0
    output = prove_writable(options.output) if options.output else None
    if reason := why_not(*(program for case in cases for program in case.programs)):
        raise UserError(f"skvr-verify hosts cannot run here: {reason}; run it as root on a machine that has them")
    found = _known(options)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="skvr-hosts-") as folder:
        lab = Lab(Path(folder) / "lab")
        for case in tqdm(cases, unit="case", leave=False, disable=None):
            outcomes.append(found.get(case.name) or play(case, lab))
            tqdm.write(_line(outcomes[-1]))
            found[case.name] = outcomes[-1]
            if options.json:
                write_json(options.json, _records(found))
    tables = _tables(outcomes)
    figure = _figure(outcomes)
    if output:
        write_whole(output, f"{_page(output)}\n* {figure}\n{tables}\n")
    return conclude([figure], table=tables, record=_records(found), json_file=options.json)


def all_cases() -> list[Case]:
    """Every case, in the order of the tables."""
    from skvr_dist.lab.hosts.docs import DOCS
    from skvr_dist.lab.hosts.faults import FAULTS
    from skvr_dist.lab.hosts.inputs import INPUTS
    from skvr_dist.lab.hosts.starts import STARTS

    return [*STARTS, *DOCS, *INPUTS, *FAULTS]


def _chosen(options: argparse.Namespace) -> list[Case]:
    cases = [case for case in all_cases() if case.quick or not options.quick]
    try:
        chosen = [case for case in cases if re.search(options.only or "", case.name)]
    except re.error as error:
        raise UserError(f"--only {options.only!r} is not a regular expression: {error}") from None
    if not chosen:
        raise UserError(f"--only {options.only!r} is in no name of: {'; '.join(case.name for case in cases)}")
    return chosen


def _records(found: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """The outcomes for machines, in the order of the tables; those of an earlier call that are not reached yet too."""
    from skvr_dist.lab.hosts.case import as_record

    return [as_record(found[case.name]) for case in all_cases() if case.name in found]


def _known(options: argparse.Namespace) -> dict[str, Outcome]:
    """With --resume, the outcomes of an earlier call that were well, by the names of their cases.

    Raises:
        UserError: they cannot be read.
    """
    from skvr_dist.lab.hosts.case import from_record

    if not options.resume:
        return {}
    if options.json is None:
        raise UserError("--resume needs --json FILE, where the outcomes of the earlier call are")
    if not options.json.exists():
        return {}
    by_name = {case.name: case for case in all_cases()}
    try:
        records = json.loads(options.json.read_text(encoding="utf-8"))
        return {
            record["case"]: from_record(record, by_name[record["case"]])
            for record in records
            if record["passed"] and record["case"] in by_name
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{options.json} does not hold outcomes of this command ({error}); leave --resume out"
        ) from None


def _line(outcome: Outcome) -> str:
    misses = "".join(f"\n    {miss}" for miss in outcome.ending.misses)
    verdict = "ok" if outcome.is_well else "MISSED"
    return f"{outcome.case.name}: {outcome.ending.found}, {outcome.seconds:.0f} s: {verdict}{misses}"


def _tables(outcomes: Sequence[Outcome]) -> str:
    parts = []
    for kind, title in _TITLES.items():
        rows = [_row(outcome) for outcome in outcomes if outcome.case.kind == kind]
        if rows:
            headers = ["case", "what is done", "outcome", "seconds", "verdict"]
            parts.append(f"\n## {title}\n\n{tabulate(rows, headers=headers, tablefmt='github', floatfmt='.0f')}")
    return "\n".join(parts)


def _row(outcome: Outcome) -> list[object]:
    case, ending = outcome.case, outcome.ending
    return [case.name, case.what, ending.found, outcome.seconds, "; ".join(ending.misses) or "ok"]


def _figure(outcomes: Sequence[Outcome]) -> Figure:
    well = sum(outcome.is_well for outcome in outcomes)
    return Figure(f"{well} of {len(outcomes)} cases end as they must", "all", well == len(outcomes))


def _page(output: Path) -> str:
    from skvr_dist.run.log import software_versions

    asked = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    commit = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    versions = software_versions()
    machine = f"no GPU; torch {versions['torch']}, deepspeed {versions['deepspeed']}"
    return _PAGE.format(date=date.today(), output=f"docs/benchmarks/{output.name}", commit=commit, machine=machine)
