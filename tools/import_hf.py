"""Import a checkpoint of Hugging Face to train it further, and check that it is the same model.

    python tools/import_hf.py Qwen/Qwen3-0.6B runs/qwen3
    python tools/import_hf.py models/model.Q4_1.gguf runs/model

SOURCE is a folder with config.json and safetensors files, a repository of the Hub, or a GGUF file, whose weights are
dequantized to float32. OUT then holds a checkpoint at step 0. Exit code 1: our decoder does not compute what
transformers does, and OUT was not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.hf.convert.import_model import ImportMismatchError, ImportReport, import_model


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to make; it must not hold anything")
    parser.add_argument(
        "--without-check", action="store_true", help="do not compare, which takes memory for the model in float32"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the check there")
    arguments = parser.parse_args()

    problem = None
    try:
        report = import_model(arguments.source, arguments.output, check=not arguments.without_check)
    except ImportMismatchError as error:
        report, problem = error.report, f"{error}; {arguments.output} was not written"
    print(_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.figures(), indent=2) + "\n", encoding="utf-8")
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
    run_command(main)
