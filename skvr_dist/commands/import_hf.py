"""Import a checkpoint of Hugging Face to train it further, and check that it is the same model.

    skvr-import Qwen/Qwen3-0.6B runs/qwen3
    skvr-import models/model.Q4_1.gguf runs/model

SOURCE is a folder with config.json and safetensors files, a repository of the Hub, or a GGUF file, whose weights are
dequantized to float32. OUT then holds a checkpoint at step 0. Exit code 1: our decoder does not compute what
transformers does, and OUT was not written.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import a_path, add_json, new_parser, parse, run_command, write_json
from skvr_dist.errors import EXIT_MISSED

if TYPE_CHECKING:
    from skvr_dist.hf.convert.import_model import ImportReport


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Import and compare; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("output", metavar="OUT", type=a_path, help="folder to make; it must not hold anything")
    parser.add_argument(
        "--without-check", action="store_true", help="do not compare, which takes memory for the model in float32"
    )
    add_json(parser, "write the figures of the check there")
    options = parse(parser)

    from skvr_dist.hf.convert.import_model import ImportMismatchError, import_model

    problem = None
    try:
        report = import_model(options.source, options.output, check=not options.without_check)
    except ImportMismatchError as error:
        report, problem = error.report, f"{error}; {options.output} was not written"
    print(_table(report))
    if options.json:
        write_json(options.json, report.figures())
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_MISSED
    return None


def _table(report: ImportReport) -> str:
    rows = {
        "architecture": report.architecture,
        "parameters": f"{report.parameters:,} in {' and '.join(report.dtypes)}",
        "bytes": f"{report.bytes:,}",
        **({"dequantized from": report.dequantized_from} if report.dequantized_from else {}),
        "tokenizer": report.tokenizer,
    }
    if check := report.check:
        rows["differing weights"] = str(len(check.differing_weights))
        rows["largest logit difference"] = (
            f"{check.max_logit_difference:.2g} over {check.positions} tokens at "
            f"{', '.join(check.strategies)} ({check.relative_logit_difference:.1e} of the largest logit)"
        )
    return tabulate(rows.items(), headers=["import", ""], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
