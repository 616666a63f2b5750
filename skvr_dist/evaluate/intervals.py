"""How sure a measured loss is: bootstrap intervals over documents (Efron and Tibshirani 1993, chapter 13).

Tokens of one document are alike, so whole documents are drawn again, with their tokens. Where documents are joined a
sequence takes the place of one.

Shapes: N sequences, S sequence length, U units (documents or sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skvr_dist.data.batch import IGNORED, MicroBatch

_RESAMPLES = 2000
_SEED = 0


class Interval(NamedTuple):
    """A mean (or another value of sums) and the middle 95 % of what other documents would have given."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """The same draws of documents for everything that is measured on the same batches, so that differences are paired.

    Args:
        batches: of one sequence length.
    """

    def __init__(self, batches: Sequence[MicroBatch]) -> None:
        units = torch.cat([_units(batch) for batch in batches])
        rows = torch.arange(len(units))[:, None] * (int(units.max()) + 1)
        _, self._unit = torch.unique(units + rows, return_inverse=True)
        counted = torch.cat([batch.labels.cpu() != IGNORED for batch in batches])
        self._tokens = self._sums(counted)
        self._draws = _draws(len(self._tokens))

    def mean(self, token_losses: Tensor) -> Interval:
        """The mean over the labels of token losses [N, S] (or of differences of two of them), which are 0 elsewhere."""
        sums = self._sums(token_losses)
        tokens = self._draws @ self._tokens
        means = (self._draws @ sums)[tokens > 0] / tokens[tokens > 0]
        low, high = np.quantile(means, [0.025, 0.975])
        return Interval(float(sums.sum() / self._tokens.sum()), float(low), float(high))

    def _sums(self, of_tokens: Tensor) -> NDArray[np.float64]:
        """float64 [U]."""
        totals = torch.zeros(int(self._unit.max()) + 1, dtype=torch.float64)
        return totals.index_add_(0, self._unit.flatten(), of_tokens.double().flatten()).numpy()


class AnswerBootstrap:
    """The same draws of documents for everything that is counted of the same answers.

    Args:
        documents: what each answer [N] belongs to; questions about one context are drawn together.
    """

    def __init__(self, documents: Sequence[Hashable]) -> None:
        numbers = {document: number for number, document in enumerate(dict.fromkeys(documents))}
        self._unit = np.array([numbers[document] for document in documents])
        self._draws = _draws(len(numbers))

    def interval(self, counts: NDArray[np.float64], value: Callable[[NDArray[np.float64]], NDArray[Any]]) -> Interval:
        """A value of sums over all answers, and of what they would be over other documents.

        Args:
            counts: [N, K], what each answer adds.
            value: [...] of sums [..., K]; where it is not a number it is left out of the interval.
        """
        sums = np.zeros((self._draws.shape[1], counts.shape[1]))
        np.add.at(sums, self._unit, counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            whole, drawn = float(value(sums.sum(axis=0))), value(self._draws @ sums)
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        return Interval(whole, float(low), float(high))


def _draws(size: int) -> NDArray[np.float64]:
    """How often each of `size` units is drawn, [resamples, size]."""
    drawn = np.random.default_rng(_SEED).multinomial(size, np.full(size, 1 / size), size=_RESAMPLES)
    return drawn.astype(np.float64)


def _units(batch: MicroBatch) -> Tensor:
    """int64 [B, S]: the unit of each token, by its number within the sequence."""
    return torch.zeros_like(batch.labels).cpu() if batch.documents is None else batch.documents.cpu()
