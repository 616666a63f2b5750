"""Print the sequences that a run will read, decoded: document boundaries, source, and what has no loss.

    skvr-show-data --config quickstart --first 0 --count 2
    skvr-show-data --config quickstart --examples questions.jsonl

Only the data section must be whole: the config.yaml of an imported checkpoint will do, with data.* overrides.
A sequence has the number that it has in the run, whatever the number of replicas: step t reads sequences
t * train.global_batch_size and following. Text in [[double brackets]] is read, but not predicted. With `--examples`
the sequences are those of fine-tuning on a jsonl file of contexts, questions and answers.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from skvr_dist.command import add_configs, add_json, add_overrides, new_parser, parse, run_command, write_json
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.config.data import DataConfig
    from skvr_dist.config.train import TrainConfig
    from skvr_dist.data.reader import Rows
    from skvr_dist.data.tokenizers.base import Tokenizer

LAST_SEQUENCE = 10**12


def main() -> None:
    """Entry point."""
    run_command(run)


def _options() -> Namespace:
    """Read and check the arguments.

    Raises:
        UserError: numbers of sequences that no run has.
    """
    parser = new_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--examples", metavar="FILE", help="fine-tuning examples instead of data.train")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first sequence (default: 0)")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="sequences (default: 4)")
    add_json(parser, "write them here too")
    add_overrides(parser)
    options = parse(parser)
    if options.first < 0 or options.count < 1:
        raise UserError(f"--first {options.first} must not be negative and --count {options.count} must be positive")
    if options.first + options.count > LAST_SEQUENCE:
        raise UserError(
            f"--first {options.first} and --count {options.count} go beyond sequence {LAST_SEQUENCE}, the last that a "
            f"run could read"
        )
    return options


def run() -> None:
    """Print the sequences, and write them where asked to."""
    options = _options()

    from skvr_dist.config.load import load_data_config
    from skvr_dist.data.tokenizers.load import load_tokenizer
    from skvr_dist.data.view import passages, render

    data, seed, train = load_data_config(options.config, options.overrides)
    tokenizer = load_tokenizer(data.tokenizer)
    read, source_of = _sequences(options.examples, data, seed, train, tokenizer)
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
        records.append({"sequence": number, "source": source, "passages": sequence})
    if options.json:
        write_json(options.json, records)


def _sequences(
    examples: str | None, data: DataConfig, seed: int, train: TrainConfig | None, tokenizer: Tokenizer
) -> tuple[Callable[[int, int], Rows], Callable[[int], str]]:
    """A function that reads sequences by number, and one that names the source of each."""
    if examples:
        from skvr_dist.config.data import HeldOutConfig, question_first_prob
        from skvr_dist.data.finetune.sequences import FinetuneSequences

        first = question_first_prob(data.train, "examples", "override one to say how they are meant")
        file = HeldOutConfig(path=examples, format="examples", question_first_prob=first)
        of_file = FinetuneSequences.open(
            file, tokenizer, tokenizer_path=data.tokenizer, sequence_length=data.sequence_length, seed=seed
        )
        return of_file.read, lambda _: examples

    from skvr_dist.train.inputs import require_made_with, training_sequences

    sequences = training_sequences(data, seed, train)
    for dataset in sequences.datasets:
        require_made_with(dataset, tokenizer, data)
    return sequences.read, sequences.source_of


if __name__ == "__main__":
    main()
