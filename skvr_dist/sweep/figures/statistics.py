"""Means over seeds with their intervals, and fits of the loss over the size of the model.

Shapes: n values, K draws of a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_NORMAL = 1.96
SIZES_OF_POWER_LAW = 4
"""With fewer sizes its three parameters would meet any points, so a straight line over the logarithm is fitted."""
_DRAWS = 1000
_EXPONENTS = np.arange(0.01, 2.0, 0.005)


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with half of its 95 % interval by Student's t; None of a single value."""

    value: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None, 1)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
        quantile = _STUDENT[count - 2] if count - 1 <= len(_STUDENT) else _NORMAL
        return cls(mean, quantile * deviation / math.sqrt(count), count)

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if self.half is None else f" ± {self.half:.4f}")


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Mean | None:
    """The mean share by which values exceed those of the same seeds of a reference, in percent; None without any."""
    shares = [100 * (values[seed] / reference[seed] - 1) for seed in values if seed in reference]
    return Mean.of(shares) if shares else None


@dataclass(frozen=True)
class Fit:
    """Loss over parameters: `power` is a + b N^-c, `log` is a + b ln N."""

    form: Literal["power", "log"]
    parameters: tuple[float, ...]
    """a, b and, of a power law, c."""
    intervals: tuple[tuple[float, float], ...] | None
    """95 % of each, by a percentile bootstrap that draws seeds within each size; None with a single seed."""

    def at(self, sizes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The fitted losses."""
        return _at(self.parameters, sizes)

    def in_words(self) -> str:
        """The formula with its numbers and their intervals."""
        shown = [
            f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if (low, high) != (value, value) else "")
            for value, (low, high) in zip(
                self.parameters, self.intervals or [(value, value) for value in self.parameters], strict=True
            )
        ]
        if self.form == "log":
            return f"{shown[0]} + {shown[1]} ln N"
        return f"{shown[0]} + {shown[1]} N^-c, c = {shown[2]}"


def fit_sizes(losses: Mapping[int, Sequence[float]]) -> Fit:
    """Fit losses by number of parameters, of two sizes at least; each size has those of its seeds."""
    sizes = np.array(sorted(losses), dtype=np.float64)
    groups = [np.array(losses[int(size)]) for size in sizes]
    form: Literal["power", "log"] = "power" if len(sizes) >= SIZES_OF_POWER_LAW else "log"
    best = _fitted(form, sizes, np.array([[group.mean() for group in groups]]))[0]
    parameters = tuple(float(value) for value in best)
    if any(len(group) < 2 for group in groups):
        return Fit(form, parameters, None)
    generator = np.random.Generator(np.random.Philox(key=0))
    drawn = np.stack([generator.choice(group, (_DRAWS, len(group))).mean(axis=1) for group in groups], axis=1)
    low, high = np.percentile(_fitted(form, sizes, drawn), [2.5, 97.5], axis=0)
    return Fit(form, parameters, tuple((float(a), float(b)) for a, b in zip(low, high, strict=True)))


def _fitted(form: str, sizes: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares of means [K, n] at sizes [n]: a and b, or a, b and c [K, 2 or 3].

    The exponent of a power law is the best of a fine grid; the rest is linear.
    """
    if form == "log":
        return _lines(np.log(sizes), means)[0]
    best, least = np.empty((len(means), 3)), np.full(len(means), np.inf)
    for exponent in _EXPONENTS:
        lines, squares = _lines((sizes / sizes[0]) ** -exponent, means)
        better = squares < least
        least[better] = squares[better]
        best[better, :2], best[better, 2] = lines[better], exponent
    best[:, 1] *= sizes[0] ** best[:, 2]
    return best


def _lines(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(a, b) of a + b x [n] by least squares to each row of y [K, n], [K, 2], and the squares that are left [K]."""
    matrix = np.stack([np.ones_like(x), x], axis=1)
    found = y @ np.linalg.pinv(matrix).T
    return found, ((found @ matrix.T - y) ** 2).sum(axis=1)


def _at(parameters: tuple[float, ...], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b, *exponent = parameters
    return a + b * (sizes ** -exponent[0] if exponent else np.log(sizes))
