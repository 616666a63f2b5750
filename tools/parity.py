"""Prove that every layout trains the same: each against a plain single-process reference.

    python tools/parity.py --matrix quick
    python tools/parity.py --matrix full --json parity.json
    python tools/parity.py --matrix full --json parity.json --resume
    python tools/parity.py --matrix full --only "offload|bf16"
    python tools/parity.py --first-use
    python tools/parity.py --support

Runs on the CPU of this machine, several processes at a time. Errors are relative: of losses, of the worst weight's
gradient in the first step and in later ones, of its length over all steps, of the gradient norm before clipping, of
what AdamW made of the gradients, and of the worst weight after the last step; bytes are measured over expected on the
rank furthest off. Exits 1 when a figure is out of tolerance. With --first-use groups obey NCCL's rule that the first
use of a communicator blocks until its ranks have come, so that what would hang on GPUs fails here.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

from tqdm import tqdm

from skvr_dist.config.layouts import support_matrix
from skvr_dist.errors import EXIT_MISSED, UserError, run_command
from skvr_dist.files import write_whole
from skvr_dist.lab.verify.cases import full_matrix, quick_matrix
from skvr_dist.lab.verify.compare import Outcome
from skvr_dist.lab.verify.matrix import as_json, as_table, from_json, run_matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", choices=["quick", "full"], default="quick")
    parser.add_argument("--layout", help="only layouts whose name contains this")
    parser.add_argument("--only", metavar="PATTERN", help="only cases in whose name this regular expression is found")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and stop")
    parser.add_argument("--first-use", action="store_true", help="keep NCCL's rule of first use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes in --json FILE, run what is missing")
    parser.add_argument("--support", action="store_true", help="print which combinations are supported, and stop")
    args = parser.parse_args()
    if args.support:
        print(support_matrix())
        return 0
    cases = {"quick": quick_matrix, "full": full_matrix}[args.matrix]()
    cases = [case for case in cases if args.layout is None or args.layout in case.layout]
    if not cases:
        raise UserError(f"no layout of the {args.matrix} matrix has {args.layout!r} in its name; leave --layout out")
    try:
        cases = [case for case in cases if args.only is None or re.search(args.only, case.name)]
    except re.error as error:
        raise UserError(f"--only {args.only!r} is not a regular expression: {error}") from None
    if not cases:
        raise UserError(
            f"no case of the {args.matrix} matrix has {args.only!r} in its name; --list prints the names, "
            f"leave --only out to run them all"
        )
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    outcomes = known_outcomes(args.json) if args.resume else []
    known = {outcome.case for outcome in outcomes}
    cases = [case for case in cases if case not in known]
    started = time.perf_counter()
    for outcome in tqdm(run_matrix(cases, first_use=args.first_use), total=len(cases), unit="case", disable=None):
        outcomes.append(outcome)
        if outcome.misses:  # not only in the table, which a long run prints at its end
            tqdm.write(f"out of tolerance: {', '.join(outcome.misses)} of {outcome.case.name}")
        if args.json:
            write_whole(args.json, json.dumps(as_json(outcomes), indent=2) + "\n")
    print(as_table(outcomes))
    missed = [outcome for outcome in outcomes if outcome.misses]
    minutes = (time.perf_counter() - started) / 60
    kept = f" ({len(known)} kept)" if known else ""
    print(f"\n{len(outcomes)} cases{kept} in {minutes:.1f} min, {len(missed)} out of tolerance")
    return EXIT_MISSED if missed else 0


def known_outcomes(file: Path | None) -> list[Outcome]:
    """What an earlier call wrote.

    Raises:
        UserError: there is no such file, or another version of this wrote it.
    """
    if file is None:
        raise UserError("--resume needs --json FILE, where the outcomes of the earlier call are")
    if not file.exists():
        return []
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} does not hold outcomes of this version ({error}); leave --resume out") from None


if __name__ == "__main__":
    run_command(main)
