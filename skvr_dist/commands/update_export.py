"""Put today's code into an export that was made before, if it stays the same model at the same strategies.

    skvr-update-export exports/routed

An export brings along the code that runs it at any strategy. When a newer transformers no longer runs that code, this
replaces it and nothing else. First the new code's weights are compared with those that are stored, its strategies and
logits with those of the old code, and its decoding with a cache with that without one. Exit code 1: they differ, and
EXPORT was left as it is.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import a_path, add_json, new_parser, parse, run_command, write_json
from skvr_dist.errors import EXIT_MISSED

if TYPE_CHECKING:
    from skvr_dist.hf.convert.update_code import CodeUpdate


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Compare, and replace the code if nothing differs; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("export", metavar="EXPORT", type=a_path, help="an exported folder")
    add_json(parser, "write the figures of the comparison there")
    options = parse(parser)

    from skvr_dist.hf.convert.update_code import update_code

    report = update_code(options.export)
    print(_table(report))
    if options.json:
        write_json(options.json, {**asdict(report), "failures": report.failures()})
    if report.failures():
        print(f"error: {'; '.join(report.failures())}; {options.export} was left as it is", file=sys.stderr)
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
    main()
