"""Retention curve of a checkpoint: loss for a list of cache strategies, as a table, JSON and a picture.

    python tools/retention.py runs/quickstart/routed --strategies full every:2 every:4

CHECKPOINT is a checkpoint's folder, or a run's, which stands for its latest checkpoint. One that was imported has no
held-out data of its own: give it with --data and --sequence-length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.errors import UserError, run_command
from skvr_dist.evaluate.curve import DEFAULT_STRATEGIES, HeldOutData, evaluate_checkpoint
from skvr_dist.evaluate.retention import RETENTION_FILE, as_table, plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--strategies", nargs="+", default=list(DEFAULT_STRATEGIES), metavar="S")
    parser.add_argument("--sequences", type=int, default=256, help="held-out sequences (default: 256)")
    parser.add_argument("--data", metavar="FOLDER", help="another held-out data set than the run's")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="tokens per sequence (default: the run's)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: retention.json in the checkpoint")
    parser.add_argument("--png", type=Path, metavar="FILE", help="default: beside the JSON")
    options = parser.parse_args()
    if options.sequences < 1 or options.batch_size < 1:
        raise UserError(f"--sequences {options.sequences} and --batch-size {options.batch_size} must be positive")
    checkpoint = Checkpoint(options.checkpoint)
    if (options.data or options.sequence_length) and checkpoint.is_trained and not options.json:
        parser.error(
            "--data and --sequence-length need --json: the checkpoint keeps the curve over its own held-out data"
        )
    measurement = evaluate_checkpoint(
        checkpoint,
        HeldOutData.of(checkpoint, options.data, options.sequence_length),
        options.strategies,
        sequences=options.sequences,
        batch_size=options.batch_size,
        device=options.device,
    )
    json_file = options.json or checkpoint.folder / RETENTION_FILE
    png_file = options.png or json_file.with_suffix(".png")
    curves = {f"step {checkpoint.step}": measurement.points}
    record = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, **measurement.record()}
    partial = json_file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(json_file)
    plot(curves, png_file)
    print(as_table(curves))
    print(
        f"over {measurement.tokens:,} tokens: {measurement.sequences} sequences of {measurement.sequence_length} from "
        f"{measurement.data} ({measurement.data_fingerprint}), documents {measurement.documents}"
    )
    print(f"written: {json_file}, {png_file}")


if __name__ == "__main__":
    run_command(main)
