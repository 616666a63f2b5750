"""Train a tokenizer on a corpus.

    skvr-train-tokenizer --input stdlib --vocab-size 2048 --output data/stdlib/tokenizer.model

A file that holds this very tokenizer is left alone; one that holds another is an error. More in docs/data.md.
"""

from __future__ import annotations

from skvr_dist.command import new_parser, parse, run_command
from skvr_dist.data.prepare.corpus import INPUT_HELP, add_corpus_arguments, corpus_from
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.files import prove_writable


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Train the tokenizer and write it."""
    parser = new_parser(__doc__)
    parser.add_argument("--input", required=True, help=INPUT_HELP)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, 256 bytes among them")
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .model file to write")
    add_corpus_arguments(parser)
    options = parse(parser)
    corpus = corpus_from(options)
    output = prove_writable(options.output, make_folder=True)
    tokenizer = train_tokenizer(corpus, vocab_size=options.vocab_size, model_type=options.model_type)
    tokenizer.save(output)
    print(f"{output}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    for reason, count in corpus.left_out.items():
        print(f"{count} documents of {options.input} were left out, each {reason}")


if __name__ == "__main__":
    main()
