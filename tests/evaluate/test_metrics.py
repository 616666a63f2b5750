"""Scores of answers are those that the benchmarks' own scripts give.

The values were computed with the functions of the published scripts: SQuAD's evaluate-v2.0.py (`get_raw_scores`),
HotpotQA's hotpot_evaluate_v1.py (`exact_match_score`, `f1_score`), TriviaQA's triviaqa_evaluation.py
(`metric_max_over_ground_truths`), MS MARCO's ms_marco_eval.py (`compute_metrics_from_files`, spaCy 3.8.18 for its
tokens), and RepLiQA's with `RougeScorer(["rougeL"])` of rouge-score 0.1.2.
"""

from __future__ import annotations

import numpy as np
import pytest

from skvr_dist.config.data import Format
from skvr_dist.evaluate.intervals import AnswerBootstrap
from skvr_dist.evaluate.metrics import METRICS, longest_common_subsequence

MARCO = [
    ("The average cost is $1,200 - don't pay more.", ["It costs about $1,200.", "Don't pay more than 1200 dollars"]),
    ("It's a well-known U.S. city in Mr. Smith's state", ["A well-known city in the U.S."]),
    ("x", ["No Answer Present."]),
    ("No Answer Present.", ["Within 3-5 business days (at 9a.m.)"]),
]


def score(form: Format, cases: list[tuple[str, list[str]]]) -> list[float]:
    """Of all cases together, by each metric of a format."""
    counts = [np.array([metric.count(text, right) for text, right in cases]) for metric in METRICS[form]]
    return [float(metric.value(each.sum(axis=0))) for metric, each in zip(METRICS[form], counts, strict=True)]


@pytest.mark.parametrize(
    ("form", "text", "right", "scores"),
    [
        ("squad", "the Eiffel Tower.", ["eiffel tower"], [1, 1]),
        ("squad", "in Paris, France", ["Paris", "Paris in France"], [0, 1]),
        ("squad", "", [""], [1, 1]),
        ("squad", "Unanswerable.", [""], [1, 1]),  # the word that stands for the script's empty answer
        ("squad", "Normandy", [""], [0, 0]),
        ("squad", "the", ["the", "of the cat"], [0, 0]),  # an answer without words is none
        ("squad", "10th-century", ["10th century", "the 10th and 11th centuries"], [0, 0]),
        ("examples", "unanswerable", ["unanswerable"], [1, 1]),
        ("hotpotqa", "yes, it is", ["yes"], [0, 0]),
        ("hotpotqa", "Yes.", ["yes"], [1, 1]),
        ("hotpotqa", "no", ["a no man"], [0, 0]),
        ("hotpotqa", "Chief of Protocol", ["the Chief of Protocol of the United States"], [0, 0.6666666666666666]),
        ("hotpotqa", "", ["the"], [1, 0]),
        ("hotpotqa", "2,500", ["2500"], [1, 1]),
        ("triviaqa", "Sunset_Boulevard", ["sunset blvd", "sunset boulevard"], [1, 1]),
        ("triviaqa", "rock\u2019n\u2019roll", ["rock n roll"], [1, 1]),
        ("triviaqa", "the T.S. Eliot poem", ["t s eliot", "eliot"], [0, 0.8571428571428571]),
        ("triviaqa", "", ["the"], [1, 0]),
        ("triviaqa", "Mars", ["sun", "sol"], [0, 0]),
        ("repliqa", "The bridge, opened on a Monday", ["It opened on Monday."], [0.6]),
        ("repliqa", "UNANSWERABLE", ["unanswerable"], [1]),
        ("repliqa", "running costs", ["the costs of running"], [0.3333333333333333]),
        ("repliqa", "", ["x"], [0]),
    ],
)
def test_official_values(form: Format, text: str, right: list[str], scores: list[float]) -> None:
    assert score(form, [(text, right)]) == pytest.approx(scores, abs=1e-12)


def test_ms_marco_as_its_script_scores_it() -> None:
    """A corpus, of which the query without an answer does not count, and each query alone."""
    assert score("ms_marco", MARCO) == pytest.approx([0.3463642023468962, 0.4827586206730084], abs=1e-12)
    assert score("ms_marco", MARCO[:1]) == pytest.approx([0.44202898550724634, 0.5833333332847223], abs=1e-12)
    assert score("ms_marco", MARCO[1:2]) == pytest.approx([0.5970636215334422, 0.5384615384201185], abs=1e-12)
    assert score("ms_marco", MARCO[3:]) == pytest.approx([0, 0], abs=1e-12)
    with np.errstate(invalid="ignore"):
        assert np.isnan(score("ms_marco", MARCO[2:3])).all()


def test_intervals_of_answers_draw_whole_contexts() -> None:
    """Ten answers about each context, all alike: the interval is that of the contexts."""
    rng = np.random.default_rng(0)
    right = (rng.random(60) < 0.5).repeat(10).astype(float)
    counts = np.stack([right, np.ones(600)], axis=1)
    mean = METRICS["squad"][0].value
    wide = AnswerBootstrap([n // 10 for n in range(600)]).interval(counts, mean)
    narrow = AnswerBootstrap(list(range(600))).interval(counts, mean)
    assert wide.mean == narrow.mean == right.mean()
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * np.sqrt(right.var() / 60), rel=0.1)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * np.sqrt(right.var() / 600), rel=0.1)


def test_longest_common_subsequence() -> None:
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4
    assert longest_common_subsequence("", "x") == 0
