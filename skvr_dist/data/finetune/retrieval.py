"""Made-up examples that can only be answered from their contexts: associative recall, and needles by depth.

Names and values are drawn anew for each example, so nothing of them can be learned by heart. Every record is a line of
the format `examples`, whose `group` says what decides how hard it is.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from skvr_dist.errors import UserError

Record = dict[str, str]
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = [consonant + vowel for consonant in _CONSONANTS for vowel in _VOWELS]


class Pairs(NamedTuple):
    """What lists of pairs are written with."""

    names: Sequence[str]
    values: Sequence[str]
    between: str
    """A name and its value."""
    after: str
    """Each pair but the last."""


SYLLABLES = Pairs([first + second for first in _SYLLABLES for second in _SYLLABLES], _SYLLABLES, " = ", "\n")
"""Thousands of names, each of several tokens."""
LETTERS = Pairs(string.ascii_uppercase, string.digits, "", "")
"""Names and values of one token each to most tokenizers, and nothing between: what a small model learns soonest."""
_BANDS = 4
"""Parts of a context that the places of pairs are told apart by."""


def recall(
    count: int, *, pairs: Sequence[int], asked: int = 1, seed: int, written: Pairs = SYLLABLES
) -> Iterator[Record]:
    """Associative recall: lists of `name = value`, of which the pair of a name is asked for.

    The group says where it stands. Answers of more pairs are for training: as many things to recall in little more
    text (multi-query associative recall, Arora et al., Zoology, arXiv 2312.04927). Three examples of four have them,
    and say so; so it is learnt, too, where the others end.

    Args:
        count: examples.
        pairs: lengths of the lists, which the examples take in turn.
        asked: pairs of such an answer: the one that is asked for, then others at random, each of the list as often.
        seed: of everything that is drawn.
        written: names and values.

    Raises:
        UserError: a list is longer than there are names.
    """
    most = len(written.names)
    if max(pairs) > most:
        raise UserError(f"{max(pairs)} pairs are more than there are names; at most {most}")
    for number in range(count):
        size = pairs[number % len(pairs)]
        generator = np.random.Generator(np.random.Philox(key=[seed, number]))
        names = [written.names[code] for code in generator.choice(most, size, replace=False)]
        values = [written.values[code] for code in generator.integers(len(written.values), size=size)]
        listed = [name + written.between + value for name, value in zip(names, values, strict=True)]
        wanted = asked if number // len(pairs) % 4 else 1  # so each length has both
        rounds = [generator.permutation(size) for _ in range(-(-wanted // size))]
        places = np.concatenate(rounds)[:wanted]
        part = f", part {places[0] * _BANDS // size + 1} of {_BANDS}" if wanted == 1 else ""
        yield {
            "context": written.after.join(listed),
            "question": names[places[0]] + (" and others" if wanted > 1 else ""),
            "answer": written.after.join(listed[place] for place in places),
            "group": f"{size:3} pairs{part}",
        }


def needles(count: int, *, filler: str, characters: int, depths: Sequence[float], seed: int) -> Iterator[Record]:
    """Needles: a sentence with a number among lines of other text, asked for the number.

    Args:
        count: examples.
        filler: the other text, of which each example takes a stretch of whole lines.
        characters: of a context, about.
        depths: shares of the context before the needle, which the examples take in turn.
        seed: of everything that is drawn.

    Raises:
        UserError: the filler is too short.
    """
    if len(filler) < 2 * characters:
        raise UserError(
            f"the filler has {len(filler)} characters, too few for contexts of {characters}; give twice as many"
        )
    for number in range(count):
        depth = depths[number % len(depths)]
        generator = np.random.Generator(np.random.Philox(key=[seed, number]))
        start = int(generator.integers(len(filler) - characters))
        lines = filler[start : start + characters].split("\n")[1:] or [""]
        name = SYLLABLES.names[int(generator.integers(len(SYLLABLES.names)))]
        value = str(generator.integers(1000, 10_000))
        at = round(depth * len(lines))
        yield {
            "context": "\n".join([*lines[:at], f"The number of {name} is {value}.", *lines[at:]]),
            "question": f"What is the number of {name}?",
            "answer": value,
            "group": f"depth {100 * depth:3.0f} %",
        }
