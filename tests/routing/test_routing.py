"""Policies, plans, liveness and cache strategies, as properties and against brute force."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.routings import ROUTINGS, SCHEDULE_STEPS

from skvr_dist.errors import UserError
from skvr_dist.lab.verify import cases
from skvr_dist.routing import (
    POLICIES,
    CacheStrategy,
    RoutingConfig,
    RoutingPlan,
    crossing_elements,
    crossing_layers,
    crossing_parts,
    draw_plan,
    fixed_plan,
    read_layers,
)
from skvr_dist.routing.policies import PolicyName

LAYERS = st.integers(1, 30)
DONOR_ROWS = LAYERS.flatmap(lambda n: st.tuples(*(st.integers(0, layer) for layer in range(n))))
RETAINED = LAYERS.flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)).map(lambda s: s | {0})))


def plan_of(routing: RoutingConfig, layers: int, rows: int = 1, seed: int = 0, step: int = 0) -> RoutingPlan:
    return draw_plan(
        routing, num_layers=layers, num_micro_batches=rows, seed=seed, step=step, schedule_steps=SCHEDULE_STEPS
    )


@given(routing=ROUTINGS, layers=LAYERS, seed=st.integers(0, 2**32), step=st.integers(0, 2**40))
def test_a_donor_is_never_later_than_its_reader(routing: RoutingConfig, layers: int, seed: int, step: int) -> None:
    plan = plan_of(routing, layers, rows=3, seed=seed, step=step)
    assert plan.donors.shape == (3, layers)
    assert (plan.donors <= np.arange(layers)).all()
    assert (plan.donors >= 0).all()


@given(routing=ROUTINGS, layers=LAYERS, rows=st.integers(1, 6), seed=st.integers(0, 99), step=st.integers(0, 99))
def test_a_row_depends_on_seed_step_and_its_index_alone(
    routing: RoutingConfig, layers: int, rows: int, seed: int, step: int
) -> None:
    plan = plan_of(routing, layers, rows, seed, step)
    longer = plan_of(routing, layers, rows + 3, seed, step)
    assert (longer.donors[:rows] == plan.donors).all()
    assert (plan.donors == plan_of(routing, layers, rows, seed, step).donors).all()


def test_every_policy_is_in_every_list() -> None:
    """One that a configuration may name is in the table, is proven by the matrix, and can be put into words."""
    assert list(get_args(PolicyName)) == list(POLICIES) == list(cases.POLICIES)
    for name, policy in POLICIES.items():
        assert policy.name == name and set(policy.parameters) == set(cases.POLICIES[name])
        assert bool(policy.words) == (name != "none")


def test_draws_are_pinned() -> None:
    """A change of these numbers silently changes what every resumed run does."""
    plan = plan_of(RoutingConfig(policy="uniform", cross_layer_prob=0.5), 12, rows=2, seed=1, step=3)
    assert plan.donors.tolist() == [
        [0, 0, 2, 1, 4, 1, 3, 7, 8, 9, 5, 11],
        [0, 1, 0, 1, 0, 1, 6, 7, 4, 9, 10, 8],
    ]


@given(donors=DONOR_ROWS)
def test_liveness_against_brute_force(donors: tuple[int, ...]) -> None:
    layers = range(len(donors))
    assert read_layers(donors).tolist() == [any(donors[reader] == layer for reader in layers) for layer in layers]
    for boundary in range(len(donors) + 1):
        crossing = crossing_layers(donors, boundary)
        brute = {donors[reader] for reader in layers if reader >= boundary and donors[reader] < boundary}
        assert crossing == tuple(sorted(brute))
        size = crossing_elements(donors, boundary, tokens=3, hidden_size=8, kv_size=2)
        assert size == 3 * (8 + 2 * 2 * len(brute))


@given(layers=LAYERS, prob=st.floats(0, 1), seed=st.integers(0, 1000))
def test_strategy_carries_at_most_one_layer(layers: int, prob: float, seed: int) -> None:
    donors = plan_of(RoutingConfig(policy="strategy", cross_layer_prob=prob), layers, seed=seed).donors[0]
    retained = tuple(int(layer) for layer in np.flatnonzero(read_layers(donors)))
    assert tuple(donors) == CacheStrategy(layers, retained).kv_source_layers
    assert all(len(crossing_layers(donors, boundary)) <= 1 for boundary in range(layers + 1))


@given(case=RETAINED)
def test_mu_is_the_nearest_retained_layer_below(case: tuple[int, set[int]]) -> None:
    layers, retained = case
    strategy = CacheStrategy(layers, tuple(sorted(retained)))
    assert strategy.kv_source_layers == tuple(max(j for j in retained if j <= layer) for layer in range(layers))
    assert strategy.retention == len(retained) / layers
    assert set(np.flatnonzero(read_layers(strategy.kv_source_layers))) == retained


def test_cache_bytes_of_the_paper() -> None:
    """Qwen3-8B at 2,048 tokens: 306 MB at full retention, 77 MB with every 4th layer (section 4.4)."""
    shape = {"kv_heads": 8, "head_dim": 128, "bytes_per_element": 2}
    full = CacheStrategy.full(36).cache_bytes_per_token(**shape)
    quarter = CacheStrategy.every(4, 36).cache_bytes_per_token(**shape)
    assert (full, quarter) == (36 * 4096, 9 * 4096)
    assert round(full * 2048 / 1e6) == 302  # the paper's 306 MB includes what generation adds
    assert full == 4 * quarter


@pytest.mark.parametrize(
    ("spec", "retained"),
    [
        ("full", (0, 1, 2, 3, 4, 5)),
        ("every:4", (0, 4)),
        ("prefix:3", (0, 1, 2)),
        ("0,2,5", (0, 2, 5)),
        ("bulk", (0, 3)),
    ],
)
def test_strategies_are_read(spec: str, retained: tuple[int, ...]) -> None:
    assert CacheStrategy.parse(spec, 6, {"bulk": "every:3"}).retained == retained


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1,2", "does not retain layer 0"),
        ("0,2,2", "once each"),
        ("0,6", "layers 0 to 5"),
        ("every:0", "at least 1"),
        ("prefix:7", "1 to 6"),
        ("evry:2", "cannot read cache strategy 'evry:2'"),
        ("every:x", "cannot read"),
    ],
)
def test_impossible_strategies_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CacheStrategy.parse(spec, 6)


def test_a_donor_later_than_its_reader_is_refused() -> None:
    with pytest.raises(UserError, match="micro-batch 1: layer 2 cannot read layer 3"):
        RoutingPlan(np.array([[0, 1, 2, 3], [0, 1, 3, 3]]))


def test_each_sequence_draws_what_a_micro_batch_of_one_would() -> None:
    routing = RoutingConfig(policy="uniform", cross_layer_prob=0.6, full_retention_share=0.2)
    size: dict[str, int] = {"num_layers": 8, "seed": 3, "step": 2}
    each = draw_plan(
        routing.model_copy(update={"draws_per": "sequence"}), num_micro_batches=3, micro_batch_size=4, **size
    )
    ones = draw_plan(routing, num_micro_batches=12, micro_batch_size=1, **size)
    assert (each.donors == ones.donors).all() and (each.num_micro_batches, each.num_layers) == (3, 8)
    assert each.of_micro_batch(1) == tuple(tuple(row) for row in ones.donors[4:8].tolist())
    assert each.cross_layer_share == ones.cross_layer_share
    unread = [set(range(8)) - {donor for row in each.of_micro_batch(q) for donor in row} for q in range(3)]
    assert each.skipped_kv_share == pytest.approx(sum(map(len, unread)) / 24)
    with pytest.raises(UserError, match="micro-batch 1, sequence 1: layer 0 cannot read layer 1"):
        RoutingPlan(np.array([[0, 0], [0, 0], [0, 0], [1, 0]]), 2)


def test_what_crosses_is_told_by_layer_and_row() -> None:
    assert crossing_parts([[0, 0, 0, 2], [0, 1, 1, 0]], 2) == ((0, 0), (0, 1), (1, 1))


@given(routing=ROUTINGS, layers=LAYERS)
@settings(max_examples=30)
def test_shares(routing: RoutingConfig, layers: int) -> None:
    plan = plan_of(routing, layers, rows=4)
    rows = plan.donors.tolist()
    cross = sum(donor != layer for row in rows for layer, donor in enumerate(row))
    unread = sum(layer not in row for row in rows for layer in range(layers))
    assert plan.cross_layer_share == pytest.approx(cross / (4 * layers))
    assert plan.skipped_kv_share == pytest.approx(unread / (4 * layers))


def test_about_43_percent_of_projections_are_skipped_at_0_75() -> None:
    plan = plan_of(RoutingConfig(policy="uniform", cross_layer_prob=0.75), 28, rows=2000)
    assert plan.skipped_kv_share == pytest.approx(0.43, abs=0.01)


def test_fixed_plan_repeats_a_row() -> None:
    assert fixed_plan((0, 0, 2), 3).donors.tolist() == [[0, 0, 2]] * 3
