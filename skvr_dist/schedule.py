"""Values that change over a run: points over its share or its steps, joined by straight lines.

A value is a function of the step and the configuration alone, so it is the same in every layout and after resuming.
Steps are counted from 0 here: step t is the one before which t steps are done.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from skvr_dist.section import Section

MOST_STEPS = 10**9
"""Of any run."""
MOST = 10**6
"""Of a value that is not a share."""
Points = Sequence[Sequence[float]]
"""Pairs of a place and the value there, in ascending order of places; of two at one place the later one holds."""


class Schedule(Section):
    """A value that follows straight lines between points, and stays level before the first and after the last.

    In place of a number, for the keys whose values say so: `{points: [[0.0, 0.0], [0.5, 0.5]]}` rises over the first
    half of the run and stays there. Two points at one place are a jump.
    """

    points: list[list[float]] = Field(min_length=1)
    """Pairs [place, value], in ascending order of places."""
    unit: Literal["share", "steps"] = "share"
    """What a place is: the `share` of the run that is done before a step (from 0 to 1; `train.schedule_steps` is the
    whole), or the number of optimizer `steps`."""

    @field_validator("points")
    @classmethod
    def _pairs(cls, points: list[list[float]]) -> list[list[float]]:
        for point in points:
            if len(point) != 2:
                raise ValueError(f"a point is a pair [place, value], but {point} has {len(point)} numbers")
        return points

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        places = [place for place, _ in self.points]
        counted = Counter(places)
        for place, following in itertools.pairwise(places):
            if following < place:
                raise ValueError(f"points must be in ascending order, but {following} comes after {place}")
        for place in places:
            if counted[place] > 2:
                raise ValueError(f"points may hold two values at one place, a jump, but {place} has more")
            if not 0 <= place <= (1 if self.unit == "share" else MOST_STEPS):
                bounds = "a share from 0 to 1 (unit: steps counts steps)"
                bounds = bounds if self.unit == "share" else f"0 to {MOST_STEPS} steps"
                raise ValueError(f"points lie at {bounds}, but one lies at {place}")
        return self


FORMS = ("<number>", "<schedule>")
"""What pydantic's errors call the two forms of a value, where they say at which key they are."""


def form_of(value: Any) -> str:
    """Which of the two forms a value has; a wrong one is told as a wrong number."""
    return FORMS[isinstance(value, Mapping | Schedule)]


def _above_zero(value: float | Schedule) -> float | Schedule:
    if isinstance(value, Schedule):
        low, high = bounds_of(value)
        if low < 0 or high == 0:
            raise ValueError(f"the values of points must be 0 or more, not all 0, but the least is {low}")
        if high > MOST:
            raise ValueError(f"the values of points must be at most {MOST}, but the largest is {high:g}")
    return value


def _shares(value: float | Schedule) -> float | Schedule:
    if isinstance(value, Schedule):
        for _, height in value.points:
            if not 0 <= height <= 1:
                raise ValueError(f"the values of points must be from 0 to 1, but one is {height}")
    return value


Share = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag(FORMS[0])] | Annotated[Schedule, Tag(FORMS[1])],
    Discriminator(form_of),
    AfterValidator(_shares),
]
"""A number from 0 to 1, or a schedule of such numbers."""
Positive = Annotated[
    Annotated[float, Field(gt=0, le=MOST), Tag(FORMS[0])] | Annotated[Schedule, Tag(FORMS[1])],
    Discriminator(form_of),
    AfterValidator(_above_zero),
]
"""A number above 0, or a schedule of numbers that are 0 at times at most."""


def value_at(value: float | Schedule, step: int, steps: int | None = None) -> float:
    """A number or a schedule at a step.

    Args:
        step: from 0 on.
        steps: of the whole run, of which a schedule over shares needs to know.
    """
    if not isinstance(value, Schedule):
        return value
    if value.unit == "steps":
        return interpolate(value.points, step)
    assert steps is not None, "a schedule over the share of a run needs its number of steps"
    return interpolate(value.points, step / steps)


def interpolate(points: Points, place: float, curve: Literal["linear", "cosine"] = "linear") -> float:
    """The value at a place: level before the first point and after the last, a line (or half a cosine) between two."""
    after = next((number for number, (x, _) in enumerate(points) if x > place), len(points))
    if after == 0 or after == len(points):
        return points[min(after, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    progress = (place - x0) / (x1 - x0)
    if curve == "cosine":
        return y1 + (y0 - y1) * 0.5 * (1 + math.cos(math.pi * progress))
    return y0 + (y1 - y0) * progress


def jumps_of(schedule: Schedule) -> list[tuple[float, float]]:
    """The places at which a schedule jumps, and its values from there on.

    Raises:
        ValueError: it changes between two places.
    """
    jumps = []
    for (place, height), (following, other) in itertools.pairwise(schedule.points):
        if place == following:
            jumps.append((following, other))
        elif height != other:
            raise ValueError(
                f"points must be level between places, but {height} at {place} is followed by {other} at {following}; "
                f"put a jump there, two points at one place"
            )
    return jumps


def first_step_at(place: float, unit: Literal["share", "steps"], steps: int) -> int:
    """The first step that lies at a place of a schedule or after it, in a run of so many steps."""
    if unit == "steps":
        return math.ceil(place)
    # The product is rounded, so the step that it names may be one off.
    return next(step for step in itertools.count(max(math.ceil(place * steps) - 1, 0)) if step / steps >= place)


def bounds_of(value: float | Schedule) -> tuple[float, float]:
    """The smallest and the largest value that a number or a schedule takes."""
    heights = [height for _, height in value.points] if isinstance(value, Schedule) else [value]
    return min(heights), max(heights)


def in_words(value: Any) -> str:
    """A schedule in few words, `0.0 at 0.0 to 0.5 at 0.5 of the run`, or any other value as it is."""
    if not isinstance(value, Schedule):
        return str(value)
    points = " to ".join(f"{height} at {place}" for place, height in value.points)
    return f"{points} {'of the run' if value.unit == 'share' else 'steps'}"
