"""What is in a checkpoint, and whether it is whole.

    skvr-inspect runs/quickstart/routed
    skvr-inspect runs/quickstart/routed/checkpoints/step-00000600 --tensors --json checkpoint.json

Reads every file and compares it with the manifest. A damaged checkpoint is an error that names the files (exit code 2).
"""

from __future__ import annotations

import math

from tabulate import tabulate

from skvr_dist.command import a_path, add_json, new_parser, parse, run_command, write_json


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Read the checkpoint and print what it holds."""
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", type=a_path, help="a checkpoint, or a run, which stands for its newest one")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_json(parser, "write what was found there too")
    options = parse(parser)

    from skvr_dist.checkpoint.folder import Checkpoint

    checkpoint = Checkpoint(options.checkpoint, verify=True)
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
    if options.tensors:
        rows = [[name, list(checkpoint.index.shape(name)), checkpoint.index.dtype(name)] for name in names]
        print("\n" + tabulate(rows, headers=["tensor", "shape", "stored in"], tablefmt="github"))
    print(f"\n{len(checkpoint.files)} files, all whole")
    if options.json:
        write_json(options.json, facts)


if __name__ == "__main__":
    main()
