"""Schedules: values between, before and after points, in shares and in steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skvr_dist.schedule import Schedule, bounds_of, first_step_at, in_words, interpolate, jumps_of, value_at

RISE = Schedule(points=[[0.0, 0.0], [0.5, 0.5]])
JUMP = Schedule(points=[[40, 0.0], [40, 0.5]], unit="steps")


@pytest.mark.parametrize(
    ("value", "step", "wanted"),
    [
        (0.3, 7, 0.3),
        (RISE, 0, 0.0),
        (RISE, 25, 0.25),
        (RISE, 50, 0.5),
        (RISE, 99, 0.5),
        (RISE, 1000, 0.5),
        (JUMP, 39, 0.0),
        (JUMP, 40, 0.5),
        (JUMP, 41, 0.5),
        (Schedule(points=[[0.9, 0.2]]), 3, 0.2),
        (Schedule(points=[[0.1, 1.0], [0.2, 0.0], [0.4, 0.8]]), 15, 0.5),
        (Schedule(points=[[0.1, 1.0], [0.2, 0.0], [0.4, 0.8]]), 30, 0.4),
    ],
)
def test_values(value: float | Schedule, step: int, wanted: float) -> None:
    assert value_at(value, step, 100) == pytest.approx(wanted, abs=1e-15)


def test_half_a_cosine_between_two_points() -> None:
    for place, wanted in [(-1, 1.0), (0, 1.0), (1, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))), (4, 0.1), (5, 0.1)]:
        assert interpolate([(0, 1.0), (4, 0.1)], place, "cosine") == pytest.approx(wanted)


@given(
    points=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5, unique_by=lambda p: p[0]),
    step=st.integers(0, 2000),
)
def test_a_value_is_between_its_bounds_and_goes_through_its_points(
    points: list[tuple[float, float]], step: int
) -> None:
    schedule = Schedule(points=sorted(map(list, points)))
    low, high = bounds_of(schedule)
    assert low - 1e-12 <= value_at(schedule, step, 1000) <= high + 1e-12
    assert all(interpolate(schedule.points, place) == height for place, height in points)


@given(steps=st.integers(1, 10**6), place=st.floats(0, 1), step=st.integers(0, 10**6))
def test_the_first_step_at_a_place(steps: int, place: float, step: int) -> None:
    first = first_step_at(place, "share", steps)
    assert first / steps >= place and (first == 0 or (first - 1) / steps < place)
    assert first_step_at(min(step, steps) / steps, "share", steps) == min(step, steps)
    assert first_step_at(step, "steps", steps) == step


def test_jumps() -> None:
    assert jumps_of(JUMP) == [(40.0, 0.5)]
    assert jumps_of(Schedule(points=[[0.0, 1.0], [0.2, 1.0], [0.2, 0.0], [0.5, 0.0], [0.5, 2.0]])) == [
        (0.2, 0),
        (0.5, 2),
    ]
    with pytest.raises(ValueError, match=r"level between places, but 0.0 at 0.0 is followed by 0.5 at 0.5; put a jump"):
        jumps_of(RISE)


def test_in_words() -> None:
    assert in_words(0.5) == "0.5"
    assert in_words(RISE) == "0.0 at 0.0 to 0.5 at 0.5 of the run"
    assert in_words(JUMP) == "0.0 at 40.0 to 0.5 at 40.0 steps"
