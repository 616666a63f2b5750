"""Put today's code into an export that was made before, if it stays the same model at the same strategies.

    python tools/update_export.py exports/routed

An export brings along the code that runs it at any strategy. When a newer transformers no longer runs that code, this
replaces it and nothing else. First the new code's weights are compared with those that are stored, its strategies and
logits with those of the old code, and its decoding with a cache with that without one. Exit code 1: they differ, and
EXPORT was left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.hf.convert.update_code import CodeUpdate, update_code


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", metavar="EXPORT", type=Path, help="a folder that tools/export_hf.py made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the comparison there")
    arguments = parser.parse_args()

    report = update_code(arguments.export)
    print(_table(report))
    if arguments.json:
        figures = {**asdict(report), "failures": report.failures()}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if report.failures():
        print(f"error: {'; '.join(report.failures())}; {arguments.export} was left as it is", file=sys.stderr)
        return EXIT_MISSED
    return None


def _table(report: CodeUpdate) -> str:
    rows = {
        "changed code files": ", ".join(report.changed_files) or "none",
        "differing weights": len(report.differing_weights),
        "strategies compared": ", ".join(report.decoding_errors),
        "largest logit difference to the old code": f"{max(report.logit_differences.values()):.1e}"
        if report.logit_differences
        else f"not compared, it does not run here: {report.old_fault}",
        "largest difference of decoding with a cache": f"{max(report.decoding_errors.values()):.1e}",
    }
    return tabulate(rows.items(), headers=["code of the export", ""], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    run_command(main)
