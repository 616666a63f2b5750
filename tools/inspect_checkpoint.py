"""What is in a checkpoint, and whether it is whole.

    python tools/inspect_checkpoint.py runs/quickstart/routed
    python tools/inspect_checkpoint.py runs/quickstart/routed/checkpoints/step-00000600 --tensors --json checkpoint.json

Reads every file and compares it with the manifest. A damaged checkpoint is an error that names the files (exit code 2).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run, which stands for its newest one")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there too")
    args = parser.parse_args()
    checkpoint = Checkpoint(args.checkpoint, verify=True)
    names = checkpoint.index.names()
    elements = sum(math.prod(checkpoint.index.shape(name)) for name in names)
    facts = {
        "folder": str(checkpoint.folder),
        **checkpoint.facts.record(),
        "weights": len(checkpoint.weight_names()),
        "tensors": len(names),
        "elements": elements,
        "bytes": sum(entry["bytes"] for entry in checkpoint.files.values()),
    }
    print(tabulate(facts.items(), tablefmt="plain"))
    if args.tensors:
        rows = [[name, list(checkpoint.index.shape(name)), checkpoint.index.dtype(name)] for name in names]
        print("\n" + tabulate(rows, headers=["tensor", "shape", "stored in"], tablefmt="github"))
    print(f"\n{len(checkpoint.files)} files, all whole")
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
