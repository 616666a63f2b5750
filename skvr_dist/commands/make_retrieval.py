"""Make up questions that can only be answered from their contexts, to train on and to measure retrieval with.

    skvr-make-retrieval recall --letters --pairs 2 2 4 8 16 --asked 16 --count 20000 --output data/retrieval/train.jsonl
    skvr-make-retrieval recall --letters --count 600 --seed 1 --output data/retrieval/held-out.jsonl
    skvr-make-retrieval needle --filler stdlib --characters 2000 --count 500 --output data/retrieval/needle.jsonl

`recall` lists pairs `name = value` and asks for one by its name. A small model learns it sooner if names and values are
of one token each (--letters), if most answers of what it trains on go on with other pairs (--asked), and if some lists
are short (--pairs). `needle` hides a sentence with a number among lines of other text
(--filler, what tools/prepare_data.py takes as --input), at depths from its beginning (0) to its end (1). Each line of
the output is an example with a `group`, by which tools/answers.py counts. Another --seed gives other examples.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from skvr_dist.command import a_path, at_least, new_parser, parse, run_command
from skvr_dist.errors import UserError
from skvr_dist.files import prove_writable, write_whole

_LONGEST_FILLER = 2_000_000
"""Characters of documents that are enough."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "recall": {"pairs": [4, 8, 16], "asked": 1, "letters": False},
    "needle": {"filler": None, "characters": 2000, "depths": [0.0, 0.25, 0.5, 0.75, 1.0]},
}
"""Of each task's own options."""


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Make the examples and write them.

    Raises:
        UserError: a depth or a number of pairs is impossible, the filler too short, or an option of another task's.
    """
    options = _options()

    from skvr_dist.data.finetune.retrieval import LETTERS, SYLLABLES, needles, recall

    file = prove_writable(options.output, make_folder=True)
    if wrong := [depth for depth in options.depths if not 0 <= depth <= 1]:
        raise UserError(f"--depths {wrong[0]} is no share of a context; give numbers from 0 to 1")
    if options.task == "recall":
        written = LETTERS if options.letters else SYLLABLES
        records = recall(options.count, pairs=options.pairs, asked=options.asked, seed=options.seed, written=written)
    elif options.filler is None:
        raise UserError("needles need other text to be hidden in; give --filler CORPUS")
    else:
        records = needles(
            options.count,
            filler=_beginning(options.filler),
            characters=options.characters,
            depths=options.depths,
            seed=options.seed,
        )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lines)
    print(f"written: {file}, {options.count} examples")


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("task", choices=("recall", "needle"))
    parser.add_argument("--output", required=True, type=a_path, metavar="FILE", help="jsonl of examples")
    parser.add_argument("--count", type=at_least(1), default=1000, metavar="N", help="examples (default: 1000)")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of what is drawn (default: 0)")
    of_recall, of_needles = parser.add_argument_group("recall"), parser.add_argument_group("needle")
    of_recall.add_argument("--pairs", type=at_least(1), nargs="+", metavar="N", help="in turn (default: 4 8 16)")
    of_recall.add_argument("--asked", type=at_least(1), metavar="N", help="pairs of three in four answers (default: 1)")
    of_recall.add_argument(
        "--letters", action="store_true", default=None, help="names are letters and values digits, at most 26 pairs"
    )
    of_needles.add_argument("--filler", metavar="CORPUS", help="the other text")
    of_needles.add_argument("--characters", type=at_least(1), metavar="N", help="of a context (default: 2000)")
    of_needles.add_argument("--depths", type=float, nargs="+", metavar="X", help="in turn (default: 0 0.25 0.5 0.75 1)")
    options = parse(parser)
    for task, defaults in _DEFAULTS.items():
        given = [name for name in defaults if getattr(options, name) is not None]
        if given and task != options.task:
            raise UserError(f"--{given[0]} is for {task} alone; leave it out for {options.task}")
        vars(options).update({name: value for name, value in defaults.items() if name not in given})
    return options


def _beginning(corpus: str) -> str:
    """The first documents of a corpus, one after another."""
    from skvr_dist.data.prepare.corpus import open_corpus

    texts: list[str] = []
    characters = 0  # to add up all texts after each of them takes minutes where they are short
    for document in open_corpus(corpus):
        texts.append(document.text)
        characters += len(document.text)
        if characters > _LONGEST_FILLER:
            break
    return "\n".join(texts)


if __name__ == "__main__":
    main()
