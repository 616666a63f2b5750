"""Tokenise a corpus into a training and a held-out data set, or check data sets.

    skvr-prepare-data --input stdlib --tokenizer data/stdlib/tokenizer.model --output data/stdlib \\
        --shards 32 --validation-share 0.05
    skvr-prepare-data --check data/stdlib

Writes OUTPUT/train, OUTPUT/validation and OUTPUT/tokenizer.model. Interrupted, the same command continues; an output
that holds these very data sets is left alone; one that holds others is an error. More in docs/data.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import add_json, new_parser, parse, run_command, write_json
from skvr_dist.data.prepare.corpus import INPUT_HELP, LEFT_OUT_FILE, add_corpus_arguments, corpus_from
from skvr_dist.errors import EXIT_MISSED

if TYPE_CHECKING:
    from skvr_dist.data.shards import Dataset


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int | None:
    """Prepare or check; returns the exit code."""
    parser = new_parser(__doc__)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--input", help=INPUT_HELP)
    task.add_argument(
        "--check", metavar="FOLDER", help="read the data sets there and compare them with their manifests"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a .model file, or a Hugging Face tokenizer.json or its folder"
    )
    parser.add_argument("--output", metavar="FOLDER")
    parser.add_argument("--shards", type=int, default=32, metavar="N", help="training shards, at least data.lanes")
    parser.add_argument("--validation-share", type=float, default=0.05, metavar="X", help="share of held-out documents")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    add_json(parser, "write the table here too")
    add_corpus_arguments(parser)
    options = parse(parser)
    if options.check:
        for name, value in vars(options).items():
            if name not in ("check", "json") and value != parser.get_default(name):
                parser.error(f"--check reads data sets as they are; leave out --{name.replace('_', '-')}")
        return _check(options.check, options.json)
    if not (options.tokenizer and options.output):
        parser.error("--input needs --tokenizer and --output")

    from skvr_dist.data.prepare.prepare import prepare
    from skvr_dist.data.shards import TRAIN
    from skvr_dist.data.tokenizers.load import load_tokenizer

    corpus = corpus_from(options)
    prepared = prepare(
        corpus,
        load_tokenizer(options.tokenizer),
        options.output,
        num_shards=options.shards,
        validation_share=options.validation_share,
        workers=options.workers,
    )
    for reason, count in prepared.datasets[TRAIN].manifest.left_out.items():
        print(f"{count} documents were left out, each {reason}: see {Path(options.output, LEFT_OUT_FILE)}")
    if not prepared.written:
        print(f"{options.output} holds these data sets already; nothing was written")
    _report([_row(name, dataset) for name, dataset in prepared.datasets.items()], options.json)
    return None


def _check(folder: str, json_file: Path | None) -> int | None:
    from skvr_dist.data.shards import check_dataset, find_datasets

    rows, problems = [], []
    for name, dataset in find_datasets(folder).items():
        found = check_dataset(dataset)
        rows.append(_row(name, dataset) | {"problems": len(found)})
        problems += found
    _report(rows, json_file)
    for problem in problems:
        print(problem)
    return EXIT_MISSED if problems else None


def _row(name: str, dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "data_set": name,
        "documents": manifest.documents,
        "shards": len(manifest.shards),
        "tokens": manifest.tokens,
        "smallest_shard": min(shard.tokens for shard in manifest.shards),
        "largest_shard": max(shard.tokens for shard in manifest.shards),
        "text_bytes_per_token": manifest.text_bytes / manifest.tokens,
    }


def _report(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    headers = {key: key.replace("_", " ") for key in rows[0]}
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3f"))
    if json_file:
        write_json(json_file, rows)


if __name__ == "__main__":
    main()
