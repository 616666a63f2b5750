"""What a replay says of a profile: times to first token, times per token, steady throughput, failed requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skvr_dist.evaluate.replay.client import Outcome
from skvr_dist.evaluate.replay.play import Replayed


@dataclass(frozen=True)
class ProfileFigures:
    """A profile under a trace; seconds, None where nothing was answered."""

    profile: str
    requests: int
    failed: int
    failures: dict[str, int]
    """How many failed, by the reason."""
    first_token_median: float | None
    """From a request's arrival to its first token."""
    first_token_p95: float | None
    per_token_median: float | None
    """Of an answer: from its first token to its last, over the tokens after the first."""
    per_token_p95: float | None
    steady_tokens_per_second: float | None
    """Tokens of all answers between the end of the warm-up and the last arrival."""
    tokens: int
    """Of all answers."""
    late_p95: float | None
    """By which requests were sent after their arrival: the client itself was too slow where this is not small."""
    counters: dict[str, float]
    """The engine's own."""


def figures_of(replayed: Replayed, warm_up: float) -> ProfileFigures:
    """Count a profile's outcomes.

    Args:
        warm_up: share of the time until the last arrival that throughput leaves out.
    """
    answered = [each for each in replayed.outcomes if not each.failure]
    failures = Counter(each.failure for each in replayed.outcomes if each.failure)
    first = [each.token_seconds[0] - each.arrival for each in answered if each.tokens]
    per_token = [
        (each.token_seconds[-1] - each.token_seconds[0]) / (len(each.tokens) - 1)
        for each in answered
        if len(each.tokens) > 1
    ]
    return ProfileFigures(
        profile=replayed.profile,
        requests=len(replayed.outcomes),
        failed=failures.total(),
        failures=dict(failures.most_common()),
        first_token_median=_quantile(first, 0.5),
        first_token_p95=_quantile(first, 0.95),
        per_token_median=_quantile(per_token, 0.5),
        per_token_p95=_quantile(per_token, 0.95),
        steady_tokens_per_second=steady_throughput(replayed.outcomes, warm_up),
        tokens=sum(len(each.tokens) for each in answered),
        late_p95=_quantile([each.sent - each.arrival for each in answered], 0.95),
        counters=replayed.counters,
    )


def steady_throughput(outcomes: Sequence[Outcome], warm_up: float) -> float | None:
    """Tokens per second between the warm-up and the last arrival, after which the server drains.

    None if no time is left in between. Tokens of answers that broke off count too: the server has made them.
    """
    end = max(each.arrival for each in outcomes)
    begin = warm_up * end
    tokens = sum(begin <= second < end for each in outcomes for second in each.token_seconds)
    return tokens / (end - begin) if end > begin else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None
