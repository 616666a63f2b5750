"""Scores of answers, as the benchmarks that they are from define them.

A metric counts each answer on its own and makes its value from the sums over all of them, so that documents can be
drawn again (`skvr_dist.evaluate.intervals`). Of most the value is a mean; BLEU is none.

| format | metrics | definition |
|---|---|---|
| `squad` | exact match, F1 | evaluate-v2.0.py (Rajpurkar et al. 2018); `unanswerable` is the empty answer |
| `examples` | exact match, F1 | the same, where that word is one like others |
| `hotpotqa` | exact match, F1 | hotpot_evaluate_v1.py (Yang et al. 2018): yes and no share no words with anything |
| `triviaqa` | exact match, F1 | triviaqa_evaluation.py (Joshi et al. 2017): over the normalized aliases |
| `ms_marco` | ROUGE-L, BLEU-1 | ms_marco_eval.py: spaCy's tokens, of the queries that have an answer |
| `repliqa` | ROUGE-L | the package rouge-score, without stemming |

Shapes: K counts of an answer, ... any number of sums.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skvr_dist.config.data import Format
from skvr_dist.data.finetune.formats import NO_ANSWER
from skvr_dist.errors import UserError

Floats = NDArray[np.float64]
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_QUOTES = "\u2018\u2019\u00b4`"  # single quotes and accents, which TriviaQA takes for punctuation too
_YES_OR_NO = ("yes", "no", "noanswer")
_NO_ANSWER_PRESENT = "No Answer Present."
_BETA = 1.2  # weight of recall in the ROUGE-L of MS MARCO


def mean_of_sums(sums: Floats) -> Floats:
    """What was counted over how many there were."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Metric:
    """A score of decoded answers."""

    name: str
    count: Callable[[str, Sequence[str]], tuple[float, ...]]
    """What an answer adds to the sums, [K], given the answers that are right."""
    value: Callable[[Floats], Floats] = mean_of_sums
    """The score, [...], from the sums [..., K]; not a number where nothing was counted."""

    def change(self, sums: Floats) -> Floats:
        """What the score of the first half of the sums [..., 2 K] has over that of the second half, [...]."""
        mine, others = np.split(sums, 2, axis=-1)
        return self.value(mine) - self.value(others)


def best_of(name: str, score: Callable[[str, str], float]) -> Metric:
    """The mean of a score against whichever right answer it is highest for."""
    return Metric(name, lambda text, right: (max(score(text, each) for each in right), 1.0))


def squad_words(text: str) -> str:
    """A text as SQuAD and HotpotQA compare it: without case, punctuation and English articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def trivia_words(text: str) -> str:
    """A text as TriviaQA compares it: punctuation, four kinds of quotes and underscores part words."""
    lower = text.replace("_", " ").lower()
    plain = "".join(" " if letter in string.punctuation + _QUOTES else letter for letter in lower)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def _shared_words(text: str, answer: str) -> float:
    """Harmonic mean of the precision and the recall of normalized words; of two empty texts 1."""
    words, wanted = text.split(), answer.split()
    if not (words and wanted):
        return float(words == wanted)
    same = sum((Counter(words) & Counter(wanted)).values())
    return 2 * same / (len(words) + len(wanted))


def words_exact(text: str, answer: str) -> float:
    """1 where an answer is right up to case, punctuation and articles, else 0."""
    return float(squad_words(text) == squad_words(answer))


def words_f1(text: str, answer: str) -> float:
    """F1 of the words of an answer."""
    return _shared_words(squad_words(text), squad_words(answer))


def _of_squad(name: str, score: Callable[[str, str], float]) -> Metric:
    """Answers without words count for none, and no answer is the empty one, which models write as a word."""

    def count(text: str, right: Sequence[str]) -> tuple[float, ...]:
        said = "" if squad_words(text) == NO_ANSWER else text
        return max(score(said, each) for each in [each for each in right if squad_words(each)] or [""]), 1.0

    return Metric(name, count)


def hotpot_f1(text: str, answer: str) -> float:
    """As SQuAD's, but yes and no have to be the whole answer, and nothing shares words with an empty one."""
    one, other = squad_words(text), squad_words(answer)
    if one != other and (one in _YES_OR_NO or other in _YES_OR_NO):
        return 0.0
    return _shared_words(one, other) if one and other else 0.0


def trivia_exact(text: str, answer: str) -> float:
    """1 where an answer is right as TriviaQA compares it, else 0."""
    return float(trivia_words(text) == trivia_words(answer))


def trivia_f1(text: str, answer: str) -> float:
    """F1 of the words of an answer; 0 where one has none."""
    one, other = trivia_words(text), trivia_words(answer)
    return _shared_words(one, other) if one and other else 0.0


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length."""
    row = [0] * (len(other) + 1)
    for mine in one:
        before = 0  # row[i] of the line above, for i one lower
        for place, theirs in enumerate(other, start=1):
            above = row[place]
            row[place] = before + 1 if mine == theirs else max(above, row[place - 1])
            before = above
    return row[-1]


def similarity(one: Sequence[str], other: Sequence[str]) -> float:
    """What both have in the same order, over all of both: from 0 to 1, and 1 for two that are empty."""
    return 2 * longest_common_subsequence(one, other) / (len(one) + len(other)) if one or other else 1.0


def _marco_rouge(text: str, right: Sequence[str]) -> tuple[float, ...]:
    """ROUGE-L that takes the best precision and the best recall, each over all answers (MS COCO's)."""
    if _NO_ANSWER_PRESENT in right:
        return 0.0, 0.0
    mine, theirs = _marco_tokens(text).split(" "), [_marco_tokens(each).split(" ") for each in right]
    common = [longest_common_subsequence(mine, each) for each in theirs]
    precision = max(common) / len(mine)
    recall = max(same / len(each) for same, each in zip(common, theirs, strict=True))
    if not (precision and recall):
        return 0.0, 1.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision), 1.0


def _marco_bleu(text: str, right: Sequence[str]) -> tuple[float, ...]:
    """Words that are right, words, and words of the answer that is closest in length."""
    if _NO_ANSWER_PRESENT in right:
        return 0.0, 0.0, 0.0
    mine, theirs = _marco_tokens(text).split(), [_marco_tokens(each).split() for each in right]
    most: Counter[str] = functools.reduce(lambda a, b: a | b, map(Counter, theirs))
    closest = min((abs(len(each) - len(mine)), len(each)) for each in theirs)[1]
    return float(sum((Counter(mine) & most).values())), float(len(mine)), float(closest)


def _bleu(sums: Floats) -> Floats:
    """BLEU-1 of a corpus: the share of words that are right, less where there are fewer than in the answers."""
    small, tiny = 1e-9, 1e-15  # the script's, against divisions by zero
    right, words, wanted = sums[..., 0], sums[..., 1], sums[..., 2]
    ratio = (words + tiny) / (wanted + small)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    counted: Floats = np.where(wanted > 0, (right + tiny) / (words + small) * brevity, np.nan)
    return counted


@functools.cache
def _english() -> Any:
    try:
        from spacy.lang.en import English
    except ImportError:
        raise UserError(
            "MS MARCO is scored on the tokens of spaCy, which is not installed; pip install 'skvr-dist[eval]', or "
            "leave out --decode"
        ) from None
    return English()


def _marco_tokens(text: str) -> str:
    """The tokens of a text, in small letters and parted by a space."""
    return " ".join(str(token).strip().lower() for token in _english().tokenizer(text))


def rouge_l(text: str, answer: str) -> float:
    """ROUGE-L's F measure as the package rouge-score has it, without stemming; importing that takes seconds."""
    words, wanted = (_ROUGE_WORD.findall(each.lower()) for each in (text, answer))
    return similarity(words, wanted) if words and wanted else 0.0


METRICS: Mapping[Format, tuple[Metric, ...]] = {
    "examples": (best_of("exact match", words_exact), best_of("F1", words_f1)),
    "squad": (_of_squad("exact match", words_exact), _of_squad("F1", words_f1)),
    "hotpotqa": (best_of("exact match", words_exact), best_of("F1", hotpot_f1)),
    "triviaqa": (best_of("exact match", trivia_exact), best_of("F1", trivia_f1)),
    "ms_marco": (Metric("ROUGE-L", _marco_rouge), Metric("BLEU-1", _marco_bleu, _bleu)),
    "repliqa": (best_of("ROUGE-L", rouge_l),),
}
"""By the format of the file that questions are from."""
