"""Prove that every layout trains the same: each against a plain single-process reference.

    python tools/parity.py --matrix quick
    python tools/parity.py --matrix full --json parity.json
    python tools/parity.py --first-use
    python tools/parity.py --support

Runs on the CPU of this machine, several processes at a time. Errors are relative: of losses, of the gradient norm
before clipping, of the worst weight's gradient in the first step, and of the worst weight after the last; bytes are
measured over expected on the rank furthest off. Exits 1 when a figure is out of
tolerance. With --first-use groups obey NCCL's rule that the first use of a communicator blocks until its ranks have
come, so that what would hang on GPUs fails here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tqdm import tqdm

from skvr_dist.errors import EXIT_MISSED, UserError, run_command
from skvr_dist.parallel.support import support_matrix
from skvr_dist.parity.cases import full_matrix, quick_matrix
from skvr_dist.parity.matrix import as_json, as_table, run_matrix


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", choices=["quick", "full"], default="quick")
    parser.add_argument("--layout", help="only layouts whose name contains this")
    parser.add_argument("--first-use", action="store_true", help="keep NCCL's rule of first use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--support", action="store_true", help="print which combinations are supported, and stop")
    args = parser.parse_args()
    if args.support:
        print(support_matrix())
        return 0
    cases = {"quick": quick_matrix, "full": full_matrix}[args.matrix]()
    cases = [case for case in cases if args.layout is None or args.layout in case.layout]
    if not cases:
        raise UserError(f"no layout of the {args.matrix} matrix has {args.layout!r} in its name; leave --layout out")
    started = time.perf_counter()
    outcomes = []
    for outcome in tqdm(run_matrix(cases, first_use=args.first_use), total=len(cases), unit="case", disable=None):
        outcomes.append(outcome)
        if outcome.misses:  # not only in the table, which a long run prints at its end
            tqdm.write(f"out of tolerance: {', '.join(outcome.misses)} of {outcome.case}")
        if args.json:
            args.json.write_text(json.dumps(as_json(outcomes), indent=2) + "\n", encoding="utf-8")
    print(as_table(outcomes))
    missed = [outcome for outcome in outcomes if outcome.misses]
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(outcomes)} cases in {minutes:.1f} min, {len(missed)} out of tolerance")
    return EXIT_MISSED if missed else 0


if __name__ == "__main__":
    run_command(main)
