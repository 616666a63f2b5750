"""Which answers change most from the first profile (full retention) to a thinner one.

The measure is what the first profile's answer costs under the thinner one: the mean over its tokens of the log
probability under the first profile less that under the thinner one, in nats per token, each token after the same tokens
before it. Texts are shown, but do not rank: greedy decoding turns one near-tie into another text, so that texts differ
as much after a harmless choice of words as after an error, while a token that the thinner cache finds improbable counts
for what it is. The mean does not favour long answers; the worst single token stands beside it, because one wrong number
in a long answer is lost in a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skvr_dist.evaluate.replay.client import TokenScores
from skvr_dist.evaluate.replay.play import Replayed
from skvr_dist.evaluate.replay.trace import Request

_SHOWN = 600
"""Characters of a prompt that are kept for people: its end, where the question is."""


@dataclass(frozen=True)
class ChangedAnswer:
    """A request whose answer the thinner cache finds less likely."""

    place: str
    name: str
    prompt: str
    """Its end, for people."""
    prompt_tokens: int
    at_first: str
    """The answer of the first profile."""
    at_thinner: str
    cost: float
    """The measure: nats per token."""
    worst_cost: float
    """Of the one token whose log probability falls most."""
    worst_token: str
    parts_at: int | None
    """The first token at which the two greedy texts differ, from 0; None where they are the same."""


@dataclass(frozen=True)
class Comparison:
    """The answers of a thinner profile beside those of the first."""

    profile: str
    compared: int
    """Answers that both profiles gave."""
    mean_cost: float | None
    """Nats per token, over all tokens of the first profile's answers; None where there are none."""
    agreement: float | None
    """Share of these tokens that the thinner profile would have chosen too, after the same tokens before them."""
    same: int
    """Answers of the same tokens."""
    answers: list[ChangedAnswer]
    """All of them, the most changed first."""


def compare(requests: Sequence[Request], first: Replayed, thinner: Replayed) -> Comparison:
    """Rank the answers that both profiles gave."""
    answers, differences, ranks = [], [], []
    for number, (before, after) in enumerate(zip(first.scores, thinner.scores, strict=True)):
        if before is None or after is None or thinner.outcomes[number].failure:
            continue
        difference = np.subtract(before.log_probs, after.log_probs)
        differences.append(difference)
        ranks.append(np.equal(after.ranks, 1))
        answers.append(_changed(requests[number], number, first, thinner, after, difference))
    answers.sort(key=lambda answer: -answer.cost)
    return Comparison(
        profile=thinner.profile,
        compared=len(answers),
        mean_cost=float(np.concatenate(differences).mean()) if answers else None,
        agreement=float(np.concatenate(ranks).mean()) if answers else None,
        same=sum(answer.parts_at is None for answer in answers),
        answers=answers,
    )


def _changed(
    request: Request, number: int, first: Replayed, thinner: Replayed, after: TokenScores, difference: np.ndarray
) -> ChangedAnswer:
    one, other = first.outcomes[number], thinner.outcomes[number]
    worst = int(difference.argmax())
    return ChangedAnswer(
        place=request.place,
        name=request.name,
        prompt=request.shown[-_SHOWN:],
        prompt_tokens=len(first.prompts[number]),
        at_first=one.text,
        at_thinner=other.text,
        cost=float(difference.mean()),
        worst_cost=float(difference[worst]),
        worst_token=after.texts[worst],
        parts_at=parting(one.tokens, other.tokens),
    )


def parting(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position at which two answers differ, be it that one of them ends; None if they are the same."""
    for position, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))
