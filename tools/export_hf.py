"""Export a checkpoint for Hugging Face transformers, at full retention, and check that it is the same model.

    python tools/export_hf.py runs/quickstart/routed exports/routed

CHECKPOINT is a checkpoint's folder, or a run's, which stands for its latest checkpoint. OUT then loads with
AutoModelForCausalLM.from_pretrained(OUT) and AutoTokenizer.from_pretrained(OUT). Exit code 1: what transformers
loads is not the checkpoint's model, and OUT was not written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.errors import EXIT_MISSED, run_command
from skvr_dist.hf import ExportMismatchError, ExportReport, Training, export_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to make; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="of the exported weights (default: the checkpoint's)")
    parser.add_argument("--without-tokenizer", action="store_true", help="export the model only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of the check there")
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.checkpoint)
    problem = None
    try:
        report = export_model(
            checkpoint.model_config,
            checkpoint.weight_names(),
            checkpoint.weight,
            None if arguments.without_tokenizer else checkpoint.tokenizer_file,
            arguments.output,
            training=Training.of(checkpoint),
            dtype=DTYPES[arguments.dtype] if arguments.dtype else checkpoint.weight("norm.weight").dtype,
        )
    except ExportMismatchError as error:
        report, problem = error.report, f"{error}; {arguments.output} was not written"
    print(_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.figures(), indent=2) + "\n", encoding="utf-8")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_MISSED
    return None


def _table(report: ExportReport) -> str:
    check = report.check
    agreeing = check.tokenizer_texts - len(check.differing_texts)
    rows = {
        "files": len(report.file_bytes),
        "bytes": f"{sum(report.file_bytes.values()):,}",
        "parameters": f"{report.parameters:,} in {report.figures()['dtype']}",
        "differing weights": len(check.differing_weights),
        "largest logit difference": f"{check.max_logit_difference:.2g} over {check.positions} tokens "
        f"({check.relative_logit_difference:.1e} of the largest logit)",
        "tokenizer": f"{agreeing} of {check.tokenizer_texts} texts agree" if check.tokenizer_texts else "none",
    }
    return tabulate(rows.items(), headers=["export", ""], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    run_command(main)
