"""Export a checkpoint for Hugging Face transformers, to run at any cache strategy, and check that it is the same model.

    skvr-export runs/quickstart/routed exports/routed --profile half=every:2

CHECKPOINT is a checkpoint's folder, or a run's, which stands for its latest checkpoint. OUT then loads with
AutoModelForCausalLM.from_pretrained(OUT) and AutoTokenizer.from_pretrained(OUT). Exit code 1: what transformers
loads is not the checkpoint's model, and OUT was not written.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from skvr_dist.command import a_path, add_json, new_parser, parse, run_command, write_json
from skvr_dist.errors import EXIT_MISSED, UserError

if TYPE_CHECKING:
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.hf.convert.export import ExportReport
    from skvr_dist.routing import CacheStrategy

DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Export and compare; returns the exit code."""
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=a_path)
    parser.add_argument("output", metavar="OUT", type=a_path, help="folder to make; it must not hold anything")
    parser.add_argument("--dtype", choices=DTYPES, help="of the exported weights (default: the checkpoint's)")
    parser.add_argument(
        "--profile", action="append", default=[], metavar="NAME=STRATEGY", help="name a strategy; may be repeated"
    )
    parser.add_argument("--prune", metavar="STRATEGY", help="leave out the projections that this strategy does not use")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument("--without-tokenizer", action="store_true", help="export the model only")
    tokenizer.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        type=a_path,
        help="the same tokenizer with all its files, such as a chat template: where the data set's was taken from",
    )
    add_json(parser, "write the figures of the check there")
    options = parse(parser)

    import torch

    from skvr_dist.checkpoint.brought import brought_by
    from skvr_dist.checkpoint.folder import Checkpoint
    from skvr_dist.hf.convert.card import Training
    from skvr_dist.hf.convert.export import ExportMismatchError, export_model
    from skvr_dist.routing import CacheStrategy

    checkpoint = Checkpoint(options.checkpoint)
    training, layers = Training.of(checkpoint), checkpoint.model_config.num_hidden_layers
    asked = _profiles(options.profile, layers)
    training = replace(training, profiles={**training.profiles, **asked})
    pruned_to = CacheStrategy.parse(options.prune, layers, training.profiles) if options.prune else None
    _require_kept(asked, pruned_to)
    names, problem = checkpoint.weight_names(), None
    try:
        report = export_model(
            checkpoint.model_config,
            names,
            checkpoint.weight,
            None if options.without_tokenizer else _tokenizer(checkpoint, options.tokenizer),
            options.output,
            training=training,
            dtype=getattr(torch, options.dtype) if options.dtype else {n: checkpoint.weight_dtype(n) for n in names},
            pruned_to=pruned_to,
            brought=brought_by(checkpoint),
        )
    except ExportMismatchError as error:
        report, problem = error.report, f"{error}; {options.output} was not written"
    print(_table(report))
    if options.json:
        write_json(options.json, report.figures())
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_MISSED
    return None


def _tokenizer(checkpoint: Checkpoint, folder: Path | None) -> Path | None:
    """The tokenizer to export: the checkpoint's own, or the same one with all its files in a folder."""
    from skvr_dist.data.tokenizers.base import mean_the_same
    from skvr_dist.data.tokenizers.load import load_tokenizer

    own = checkpoint.tokenizer_file
    if folder is None or own is None:
        if folder is not None:
            raise UserError(f"checkpoint {checkpoint.folder} has no tokenizer to compare {folder} with; copy its files")
        return own
    ours, given = load_tokenizer(own), load_tokenizer(folder)
    if ours.sha256 != given.sha256 and not mean_the_same(ours, given):
        raise UserError(
            f"tokenizer {folder} is {given.sha256[:12]}, but {checkpoint.folder} was trained with {ours.sha256[:12]}; "
            f"give the folder that the data set was prepared with"
        )
    return folder / "tokenizer.json"


def _profiles(texts: list[str], num_layers: int) -> dict[str, str]:
    """Parse options of the form NAME=STRATEGY."""
    from skvr_dist.routing import CacheStrategy

    profiles = dict(text.partition("=")[::2] for text in texts)
    for name, spec in profiles.items():
        if not name or not spec:
            raise UserError(f"--profile {name}={spec} must look like NAME=STRATEGY, such as half=every:2")
        if CacheStrategy.is_spec(name):
            raise UserError(f"--profile {name}={spec}: {name} is a strategy itself; give the profile another name")
        CacheStrategy.parse(spec, num_layers)
    return profiles


def _require_kept(profiles: dict[str, str], pruned_to: CacheStrategy | None) -> None:
    """Raises `UserError` if a profile that was asked for retains a layer that is pruned."""
    from skvr_dist.hf.convert.bundle import servable

    if pruned_to is None:
        return
    kept = servable(profiles, pruned_to.num_layers, pruned_to.retained)
    for name in profiles.keys() - kept:
        raise UserError(
            f"--profile {name}={profiles[name]} retains layers that --prune leaves out, which keeps "
            f"{list(pruned_to.retained)}; leave one of the two out"
        )


def _table(report: ExportReport) -> str:
    check = report.check
    copied = "copied as it is" if "tokenizer.json" in report.file_bytes else "none"
    agreeing = check.tokenizer_texts - len(check.differing_texts)
    converted = f"{agreeing} of {check.tokenizer_texts} texts agree"
    converted += f"; {report.left_behind}" if report.left_behind else ""
    rows = {
        "files": len(report.file_bytes),
        "bytes": f"{sum(report.file_bytes.values()):,}",
        "parameters": f"{report.parameters:,} in {report.figures()['dtype']}",
        "differing weights": len(check.differing_weights),
        "largest logit difference": f"{check.max_logit_difference:.2g} over {check.positions} tokens at "
        f"{', '.join(check.strategies)} ({check.relative_logit_difference:.1e} of the largest logit)",
        "decoding with a cache": f"{max(check.decoding_errors.values()):.1e} of the largest logit from none, over "
        f"{len(check.decoding_errors)} strategies and kinds of cache",
        "tokenizer": converted if check.tokenizer_texts else copied,
    }
    return tabulate(rows.items(), headers=["export", ""], tablefmt="github", disable_numparse=True)


if __name__ == "__main__":
    main()
