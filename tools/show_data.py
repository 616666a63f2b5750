"""Print the sequences that a run will read, decoded: document boundaries, source, and what has no loss.

    python tools/show_data.py --config configs/experiment/quickstart.yaml --first 0 --count 2
    python tools/show_data.py --config configs/experiment/quickstart.yaml --examples questions.jsonl

Only the data section must be whole: the config.yaml of an imported checkpoint will do, with data.* overrides.
A sequence has the number that it has in the run, whatever the number of replicas: step t reads sequences
t * train.global_batch_size and following. Text in [[double brackets]] is read, but not predicted. With `--examples`
the sequences are those of fine-tuning on a jsonl file of contexts, questions and answers.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from skvr_dist.config.load import load_data_config
from skvr_dist.data.finetune import FinetuneSequences, read_examples
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.view import passages, render
from skvr_dist.errors import UserError, run_command
from skvr_dist.files import prove_writable, write_whole
from skvr_dist.train.inputs import require_made_with, training_sequences

LAST_SEQUENCE = 10**12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML configuration")
    parser.add_argument("--examples", metavar="FILE", help="fine-tuning examples instead of data.train")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first sequence (default: 0)")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="sequences (default: 4)")
    parser.add_argument("--json", metavar="FILE", help="write them here too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    if options.first < 0 or options.count < 1:
        raise UserError(f"--first {options.first} must not be negative and --count {options.count} must be positive")
    if options.first + options.count > LAST_SEQUENCE:
        raise UserError(
            f"--first {options.first} and --count {options.count} go beyond sequence {LAST_SEQUENCE}, the last that a "
            f"run could read"
        )
    if options.json:
        options.json = prove_writable(options.json)
    data, seed = load_data_config(options.config, options.overrides)
    tokenizer = Tokenizer.load(data.tokenizer)
    if options.examples:
        examples = FinetuneSequences(
            read_examples(options.examples),
            tokenizer,
            sequence_length=data.sequence_length,
            seed=seed,
        )
        read, source_of = examples.read, lambda _: options.examples
    else:
        sequences = training_sequences(data, seed)
        for training_set in sequences.sources.values():
            require_made_with(training_set.dataset, tokenizer, data)
        read, source_of = sequences.read, sequences.source_of
    records: list[dict[str, Any]] = []
    for number in range(options.first, options.first + options.count):
        rows, source = read(number, 1), source_of(number)
        sequence = passages(rows, 0, tokenizer)
        for sentence in rows.damage:
            print(f"left out: {sentence}")
        predicted = sum(passage.tokens for passage in sequence if passage.is_predicted)
        print(
            f"======== sequence {number} from {source}: {data.sequence_length} tokens, {predicted} of them "
            f"predicted, {sequence[-1].document + 1} documents"
        )
        print(render(sequence) + "\n")
        if options.json:
            shown = [asdict(passage) for passage in sequence]
            records.append({"sequence": number, "source": source, "passages": shown})
    if options.json:
        write_whole(options.json, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
