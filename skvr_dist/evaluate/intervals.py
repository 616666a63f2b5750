"""How sure a measured loss is: bootstrap intervals over documents (Efron and Tibshirani 1993, chapter 13).

Tokens of one document are alike, so whole documents are drawn again, with their tokens. Where documents are joined a
sequence takes the place of one.

Shapes: N sequences, S sequence length, U units (documents or sequences).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skvr_dist.data.batch import IGNORED, MicroBatch

_RESAMPLES = 2000
_SEED = 0


class Interval(NamedTuple):
    """A mean over tokens and the middle 95 % of what other documents would have given."""

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
        size = len(self._tokens)
        drawn = np.random.default_rng(_SEED).multinomial(size, np.full(size, 1 / size), size=_RESAMPLES)
        self._draws: NDArray[np.float64] = drawn.astype(np.float64)

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


def _units(batch: MicroBatch) -> Tensor:
    """int64 [B, S]: the unit of each token, by its number within the sequence."""
    return torch.zeros_like(batch.labels).cpu() if batch.documents is None else batch.documents.cpu()
