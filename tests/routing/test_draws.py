"""Draws of donors and of initial weights: to the bit as docs/draws.md says, and of the distributions that it promises.

Every check of a distribution is a set of chi-square tests. It fails when the smallest of their p-values, times their
number, is below `SIGNIFICANCE`, so a right rule would fail for one seed in 10,000 (the seeds here are fixed). That it
can fail is shown on rules that are a little wrong.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.routings import ROUTINGS, SCHEDULE_STEPS

from skvr_dist.config.model import ModelConfig
from skvr_dist.lab.verify import draws
from skvr_dist.lab.verify.cases import Case
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.routing import POLICIES, RoutingConfig, draw_plan, plan
from skvr_dist.schedule import Schedule

Rows = NDArray[np.int64]

SIGNIFICANCE = 1e-4
ROWS, LAYERS = 100_000, 6
P, WINDOW, GROUP = 0.6, 2, 3
PARAMETERS: dict[str, Any] = {"cross_layer_prob": P, "window": WINDOW, "group_size": GROUP}
ROUTING = {
    name: RoutingConfig(policy=policy.name, **{each: PARAMETERS[each] for each in policy.parameters})
    for name, policy in POLICIES.items()
}
# What a layer > 0 reads, each equally likely, once its coin sends it elsewhere; `row` are the donors below it.
ELSEWHERE: dict[str, Callable[[int, tuple[int, ...]], list[int]]] = {
    "none": lambda layer, row: [layer],
    "uniform": lambda layer, row: list(range(layer)),
    "strategy": lambda layer, row: [max(kept for kept in range(layer) if row[kept] == kept)],  # the nearest kept one
    "window": lambda layer, row: list(range(max(layer - WINDOW, 0), layer)),
    "cla": lambda layer, row: [layer // GROUP * GROUP],
    "rd_cla": lambda layer, row: [layer // GROUP * GROUP],
}


@pytest.fixture(scope="module", autouse=True)
def _numbers_are_drawn_once() -> Iterator[None]:
    """100,000 rows take seconds, and policies draw the same numbers: a pure function's, so the test is no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_uniforms", functools.lru_cache(4 * ROWS)(plan._uniforms))
        yield


def chi_square(counts: NDArray[Any], probabilities: NDArray[Any]) -> float:
    """The p-value of Pearson's test; 0 if anything was counted that cannot be."""
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    wanted = probabilities[possible] * counts.sum()
    assert len(wanted) == 1 or wanted.min() >= 5, "too few draws for the test"
    statistic, freedom = ((counts[possible] - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    if freedom == 0:
        return 1.0
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


def rejected(p_values: list[float]) -> bool:
    """With Bonferroni's correction: however many tests there are, a right rule is rejected no more often."""
    return min(p_values) * len(p_values) < SIGNIFICANCE


def rule_of(policy: str, prob: float = P) -> dict[tuple[int, ...], float]:
    """The probability of every row of donors of `LAYERS` layers, from the definition of the policy."""
    rows: dict[tuple[int, ...], float] = {(0,): 1.0}
    for layer in range(1, LAYERS):
        longer: dict[tuple[int, ...], float] = {}
        for row, probability in rows.items():
            others = ELSEWHERE[policy](layer, row)
            share = {"none": 0.0, "cla": 1.0}.get(policy, prob)
            for donor, part in [(layer, 1 - share), *((other, share / len(others)) for other in others)]:
                longer[(*row, donor)] = longer.get((*row, donor), 0.0) + probability * part
        rows = longer
    return rows


def p_values_of_rows(donors: Rows, rule: dict[tuple[int, ...], float]) -> list[float]:
    """p-values of the donors of each layer, of each pair of layers, and of whole rows."""
    rows, probabilities = np.array(list(rule)), np.array(list(rule.values()))
    subsets = [*itertools.combinations(range(LAYERS), 1), *itertools.combinations(range(LAYERS), 2), range(LAYERS)]
    p_values = []
    for layers in subsets:
        place = LAYERS ** np.arange(len(layers))  # a number for each combination of donors
        cells = LAYERS ** len(layers)
        wanted = np.bincount(rows[:, layers] @ place, weights=probabilities, minlength=cells)
        p_values.append(chi_square(np.bincount(donors[:, layers] @ place, minlength=cells), wanted))
    return p_values


def test_every_policy_has_a_rule_here_and_a_wrong_one() -> None:
    """Written from its definition, in `ELSEWHERE`; and in `WRONG`, so that the test of its distribution can fail."""
    assert list(ELSEWHERE) == list(POLICIES)
    assert {policy for policy, _ in WRONG.values()} == set(POLICIES)


@pytest.mark.parametrize("policy", ROUTING)
def test_donors_have_the_distribution_of_their_policy(policy: str) -> None:
    """Each layer's donors; each pair of layers, which are independent except under `strategy`; and whole rows."""
    donors = draw_plan(ROUTING[policy], num_layers=LAYERS, num_micro_batches=ROWS, seed=11, step=5).donors
    rule = rule_of(policy)
    assert sum(rule.values()) == pytest.approx(1.0)
    assert not rejected(p_values_of_rows(donors, rule))


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.is_random])
@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_certain_donors(policy: str, prob: float) -> None:
    routing = ROUTING[policy].model_copy(update={"cross_layer_prob": prob})
    donors = draw_plan(routing, num_layers=LAYERS, num_micro_batches=10_000, seed=11, step=5).donors
    rule = {row: probability for row, probability in rule_of(policy, prob).items() if probability > 0}
    assert not rejected(p_values_of_rows(donors, rule))


# The first 16 digits of the SHA-256 of the donors of 50 steps of 7 micro-batches, before rates could be schedules.
PINNED = {
    "none": "e619a829b1284412",
    "uniform": "7ff8980056571d72",
    "strategy": "7e44e6c4b4ae5098",
    "window": "bd8e24c3aa636eb7",
    "cla": "a56689ba68bd8fa4",
    "rd_cla": "ce6fb448354c9a97",
}


@pytest.mark.parametrize("policy", PINNED)
def test_plans_at_a_constant_rate_are_pinned(policy: str) -> None:
    """Also where the constant is given as a schedule."""
    forms = [ROUTING[policy]]
    if POLICIES[policy].is_random:
        forms.append(ROUTING[policy].model_copy(update={"cross_layer_prob": Schedule(points=[[0.0, P], [1.0, P]])}))
    for routing in forms:
        digest = hashlib.sha256()
        for step in range(50):
            plan = draw_plan(routing, num_layers=6, num_micro_batches=7, seed=11, step=step, schedule_steps=30)
            digest.update(plan.donors.tobytes())
        assert digest.hexdigest()[:16] == PINNED[policy]


RISE = Schedule(points=[[0.2, 0.0], [0.7, 1.0]])


@pytest.mark.parametrize(("step", "prob"), [(0, 0.0), (20, 0.0), (40, 0.4), (50, 0.6), (99, 1.0)])
def test_a_rising_rate_is_drawn_as_the_number_that_it_is_at_the_step(step: int, prob: float) -> None:
    """The same donors to the bit, since the coins are the same; so their distribution is that of the number."""
    size: dict[str, Any] = {"num_layers": LAYERS, "num_micro_batches": 500, "seed": 11, "step": step}
    for policy in ("uniform", "strategy", "window", "rd_cla"):
        routing = ROUTING[policy].model_copy(update={"cross_layer_prob": RISE})
        constant = routing.model_copy(update={"cross_layer_prob": prob})
        rising = draw_plan(routing, **size, schedule_steps=100).donors
        assert (rising == draw_plan(constant, **size).donors).all()


def mixed(rule: dict[tuple[int, ...], float], full_share: float) -> dict[tuple[int, ...], float]:
    """A rule under which a share of the rows is at full retention instead."""
    rows = {row: (1 - full_share) * probability for row, probability in rule.items()}
    own = tuple(range(LAYERS))
    return {**rows, own: rows[own] + full_share}


def test_micro_batches_at_full_retention_have_their_share() -> None:
    """A third of a run in, of a share that falls from 0.6 to 0.3 and a rate that rises to P; slightly else fails."""
    routing = RoutingConfig(
        policy="strategy",
        cross_layer_prob=Schedule(points=[[0.0, 0.0], [1 / 3, P]]),
        full_retention_share=Schedule(points=[[0.0, 0.6], [1.0, 0.3]]),
    )
    size = {"num_layers": LAYERS, "num_micro_batches": ROWS, "schedule_steps": 900}
    donors = draw_plan(routing, **size, seed=11, step=300).donors
    assert not rejected(p_values_of_rows(donors, mixed(rule_of("strategy"), 0.5)))
    assert rejected(p_values_of_rows(donors, mixed(rule_of("strategy"), 0.52)))
    assert rejected(p_values_of_rows(donors, mixed(rule_of("strategy", P + 0.02), 0.5)))


OWN = np.arange(LAYERS)


def with_own_first(donors: NDArray[Any]) -> Rows:
    """Layer 0 has no donor."""
    return np.where(OWN == 0, 0, donors).astype(np.int64)


def below(pick: NDArray[Any], count: NDArray[Any]) -> Rows:
    return np.minimum((pick * count).astype(np.int64), np.maximum(count - 1, 0))


def nearest_kept(kept: NDArray[Any]) -> Rows:
    return np.maximum.accumulate(np.where(kept | (OWN == 0), OWN, 0), axis=1)


# Each is right but for one thing, given the coins and picks of all micro-batches, [Q, L].
WRONG: dict[str, tuple[str, Callable[[NDArray[Any], NDArray[Any]], Rows]]] = {
    "a probability 0.01 too high": ("uniform", lambda c, p: np.where(c < P + 0.01, below(p, OWN), OWN)),
    "a probability 0.01 too low": ("uniform", lambda c, p: np.where(c < P - 0.01, below(p, OWN), OWN)),
    "the coin the other way round": ("uniform", lambda c, p: np.where(c >= P, below(p, OWN), OWN)),
    "own layer among the donors": ("uniform", lambda c, p: np.where(c < P, below(p, OWN + 1), OWN)),
    "layer 0 is never a donor": (
        "uniform",
        lambda c, p: np.where(c < P, np.minimum(1 + below(p, OWN - 1), OWN), OWN),
    ),
    "the nearest layer is never a donor": (
        "uniform",
        lambda c, p: np.where(c < P, below(p, np.maximum(OWN - 1, 1)), OWN),
    ),
    "rounded instead of cut off": (
        "uniform",
        lambda c, p: np.where(c < P, np.minimum(np.rint(p * OWN), np.maximum(OWN - 1, 0)), OWN),
    ),
    "one coin for all layers": ("uniform", lambda c, p: np.where(c[:, :1] < P, below(p, OWN), OWN)),
    "one pick for all layers": ("uniform", lambda c, p: np.where(c < P, below(p[:, :1], OWN), OWN)),
    "the coin is the pick": ("uniform", lambda c, p: np.where(c < P, below(c, OWN), OWN)),
    "a window of one more": (
        "window",
        lambda c, p: np.where(c < P, OWN - 1 - below(p, np.minimum(OWN, WINDOW + 1)), OWN),
    ),
    "a window that begins one lower": (
        "window",
        lambda c, p: np.where(c < P, np.maximum(OWN - 2 - below(p, np.minimum(OWN, WINDOW)), 0), OWN),
    ),
    "a window's probability 0.01 too high": (
        "window",
        lambda c, p: np.where(c < P + 0.01, OWN - 1 - below(p, np.minimum(OWN, WINDOW)), OWN),
    ),
    "kept 0.01 too seldom": ("strategy", lambda c, p: nearest_kept(c >= P + 0.01)),
    "kept where it should be dropped": ("strategy", lambda c, p: nearest_kept(c < P)),
    "a lower one than the nearest kept": (
        "strategy",
        lambda c, p: np.where(c < P, np.maximum(nearest_kept(c >= P) - 1, 0), OWN),
    ),
    "kept layers drawn anew for each reader": (
        "strategy",
        lambda c, p: np.where(c < P, np.maximum(OWN - 1 - (np.log(p + 1e-300) / math.log(P)).astype(int), 0), OWN),
    ),
    "fixed groups of one more": ("cla", lambda c, p: np.tile(OWN - OWN % (GROUP + 1), (len(c), 1))),
    "fixed groups that begin one higher": (
        "cla",
        lambda c, p: np.tile(np.maximum(OWN - (OWN - 1) % GROUP, 0), (len(c), 1)),
    ),
    "a coin where there is none": ("cla", lambda c, p: np.where(c < 0.99, OWN - OWN % GROUP, OWN)),
    "groups of one more": ("rd_cla", lambda c, p: np.where(c < P, OWN - OWN % (GROUP + 1), OWN)),
    "a group's probability 0.01 too low": ("rd_cla", lambda c, p: np.where(c < P - 0.01, OWN - OWN % GROUP, OWN)),
    "a coin for the whole group": (
        "rd_cla",
        lambda c, p: np.where(c[:, OWN - OWN % GROUP] < P, OWN - OWN % GROUP, OWN),
    ),
    "routing although there is none": ("none", lambda c, p: np.where(c < 0.01, np.maximum(OWN - 1, 0), OWN)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_is_slightly_wrong_is_rejected(name: str) -> None:
    policy, draw = WRONG[name]
    coin, pick = np.random.Generator(np.random.PCG64(3)).random((2, ROWS, LAYERS))
    assert rejected(p_values_of_rows(with_own_first(draw(coin, pick)), rule_of(policy)))


def test_the_same_rules_without_their_mistake_are_accepted() -> None:
    """So that what rejects them is the mistake."""
    coin, pick = np.random.Generator(np.random.PCG64(3)).random((2, ROWS, LAYERS))
    elsewhere = coin < P
    right = {
        "uniform": np.where(elsewhere, below(pick, OWN), OWN),
        "window": np.where(elsewhere, OWN - 1 - below(pick, np.minimum(OWN, WINDOW)), OWN),
        "strategy": nearest_kept(~elsewhere),
        "rd_cla": np.where(elsewhere, OWN - OWN % GROUP, OWN),
    }
    for policy, donors in right.items():
        assert not rejected(p_values_of_rows(with_own_first(donors), rule_of(policy))), policy


# Draws of two seeds, and of as many steps as micro-batches, so that these can change places.
SEEDS, STEPS = 2, 224
_UPPER = np.triu_indices(STEPS, 1)
NEIGHBOURS: dict[str, Callable[[Rows], tuple[Rows, Rows]]] = {
    "seeds": lambda grid: (grid[0], grid[1]),
    "steps": lambda grid: (grid[:, 0::2], grid[:, 1::2]),
    "micro-batches": lambda grid: (grid[:, :, 0::2], grid[:, :, 1::2]),
    "a seed and a step": lambda grid: (grid[0, 1:], grid[1, :-1]),
    "a seed and a micro-batch": lambda grid: (grid[0, :, 1:], grid[1, :, :-1]),
    "a step and a micro-batch": lambda grid: (grid[:, 1::2, 0::2], grid[:, 0::2, 1::2]),
    "step and micro-batch changed about": lambda grid: (
        grid[:, _UPPER[0], _UPPER[1]],
        grid[:, _UPPER[1], _UPPER[0]],
    ),
}


def p_values_of_neighbours(grid: Rows) -> dict[str, list[float]]:
    """p-values of independence between neighbours among draws [seed, step, micro-batch, layer], by what differs."""
    rule = rule_of("uniform")
    rows, probabilities = np.array(list(rule)), np.array(list(rule.values()))
    alone = [np.bincount(rows[:, layer], weights=probabilities, minlength=LAYERS) for layer in range(LAYERS)]
    found: dict[str, list[float]] = {}
    for name, take in NEIGHBOURS.items():
        one, other = (side.reshape(-1, LAYERS) for side in take(grid))
        found[name] = [
            chi_square(
                np.bincount(one[:, a] * LAYERS + other[:, b], minlength=LAYERS**2), np.outer(alone[a], alone[b]).ravel()
            )
            for a, b in itertools.product(range(1, LAYERS), repeat=2)
        ]
    return found


def test_seeds_steps_and_micro_batches_are_independent() -> None:
    """In 100,352 draws, for every layer against every layer of the neighbour."""
    plans = [
        [
            draw_plan(ROUTING["uniform"], num_layers=LAYERS, num_micro_batches=STEPS, seed=seed, step=step).donors
            for step in range(STEPS)
        ]
        for seed in range(SEEDS)
    ]
    for name, p_values in p_values_of_neighbours(np.array(plans)).items():
        assert not rejected(p_values), name


@pytest.mark.parametrize(
    ("wrong", "differs"),
    [
        (lambda seed, step, q: (0, step, q), "seeds"),
        (lambda seed, step, q: (seed, 0, q), "steps"),
        (lambda seed, step, q: (seed, step // 2, q), "steps"),
        (lambda seed, step, q: (seed, step, 0), "micro-batches"),
        (lambda seed, step, q: (0, step + seed, q), "a seed and a step"),
        (lambda seed, step, q: (0, step, q + seed), "a seed and a micro-batch"),
        (lambda seed, step, q: (seed, step + q, 0), "a step and a micro-batch"),
        (lambda seed, step, q: (seed, step * q, step + q), "step and micro-batch changed about"),
    ],
)
def test_keys_that_coincide_are_rejected(wrong: Callable[..., tuple[Any, ...]], differs: str) -> None:
    """Draws whose key mixes up what it is made of: each row is right on its own."""
    seed, step, q = np.indices((SEEDS, STEPS, STEPS))
    key = np.ravel_multi_index([np.broadcast_to(part, seed.shape) for part in wrong(seed, step, q)], (2, STEPS**2, 512))
    _, number = np.unique(key, return_inverse=True)
    coin, pick = np.random.Generator(np.random.PCG64(3)).random((2, number.max() + 1, LAYERS))
    rows = np.where(coin < P, below(pick, OWN), OWN)
    assert rejected(p_values_of_neighbours(rows[number.reshape(seed.shape)])[differs])


def test_philox_against_its_published_vectors() -> None:
    """Known answers of Random123 (`philox4x64 10`)."""
    pi = (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89)
    key = 0x452821E638D01377 + (0xBE5466CF34E90C6C << 64)
    assert draws.philox((0, 0, 0, 0), 0) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    assert draws.philox(pi, key) == (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6)


@given(
    routing=ROUTINGS,
    layers=st.integers(1, 12),
    seed=st.integers(0, 2**100),
    step=st.integers(0, SCHEDULE_STEPS + 2) | st.integers(0, 2**40),
    rows=st.integers(1, 5),
)
@settings(max_examples=60)
def test_the_reference_draws_the_same_donors(
    routing: RoutingConfig, layers: int, seed: int, step: int, rows: int
) -> None:
    size = {"num_layers": layers, "num_micro_batches": rows, "schedule_steps": SCHEDULE_STEPS}
    drawn = draw_plan(routing, **size, seed=seed, step=step).donors
    assert drawn.tolist() == draws.plan(routing.model_dump(), layers, rows, seed=seed, step=step, steps=SCHEDULE_STEPS)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", [0, 7, 2**70])
def test_the_reference_draws_the_same_initial_weights(family: str, tied: bool, seed: int) -> None:
    case = Case("single", family=family, tied=tied, initializer_range=0.02)
    decoder = Decoder(ModelConfig.model_validate(case.shape))
    initialize(decoder, seed)
    wanted = draws.initial_weights(case.shape, seed)
    drawn = dict(decoder.named_parameters())
    assert drawn.keys() == wanted.keys()
    assert all(torch.equal(drawn[name], wanted[name]) for name in wanted)


BINS = 64


def p_value_of_normal(weights: torch.Tensor, deviation: float) -> float:
    """The p-value of numbers against a normal distribution, in bins of equal probability."""
    share = torch.special.ndtr(weights.double().flatten() / deviation)
    counts = torch.bincount((share * BINS).long().clamp(max=BINS - 1), minlength=BINS)
    return chi_square(counts.numpy(), np.full(BINS, 1 / BINS))


def test_initial_weights_are_normal_and_independent() -> None:
    """100,352 numbers of each of four matrices, and the correlations over names, seeds and shifts."""
    shape = {**Case("single").shape, "vocab_size": 392, "hidden_size": 256, "num_hidden_layers": 1}
    drawn = {}
    for seed in (7, 8):
        decoder = Decoder(ModelConfig.model_validate(shape))
        initialize(decoder, seed)
        for name in ("embed_tokens.weight", "lm_head.weight"):
            drawn[name, seed] = decoder.get_parameter(name).detach()
    right = [p_value_of_normal(weight, 0.1) for weight in drawn.values()]
    assert not rejected(right)
    flat = [weight.flatten() / 0.1 for weight in drawn.values()]
    pairs = [*itertools.combinations(flat, 2), *((x[:-1], x[1:]) for x in flat), *((x[:-256], x[256:]) for x in flat)]
    # A correlation of n pairs has a standard deviation of 1 / sqrt(n).
    deviations = [abs(float(a @ b)) / math.sqrt(len(a)) for a, b in pairs]
    assert not rejected([math.erfc(z / math.sqrt(2)) for z in deviations])
    one = drawn["lm_head.weight", 7]
    assert rejected([p_value_of_normal(one * 1.03, 0.1)]) and rejected([p_value_of_normal(one.clamp(-0.2, 0.2), 0.1)])
