"""Routing policies: the rules that draw a donor for each layer.

Every policy is a function of two draws per layer, whether it reads a donor and which one, so that a row of a plan is
a pure function of its random bits. Layer 0 always reads its own keys and values. docs/draws.md has it to the bit.

Shapes: Q micro-batches, L layers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from skvr_dist.routing.config import RoutingConfig

Donors = NDArray[np.int64]
Flags = NDArray[np.bool_]
Uniforms = NDArray[np.float64]


def _own(pick: Uniforms) -> Donors:
    """int64 [L]: every layer's own number."""
    return np.arange(pick.shape[-1], dtype=np.int64)


def _pick_below(pick: Uniforms, count: Donors) -> Donors:
    """floor(pick * count), an integer uniform in [0, count) for each layer."""
    return np.minimum((pick * count).astype(np.int64), np.maximum(count - 1, 0))


def _none(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """Standard training: every layer reads its own."""
    return _own(pick)


def _uniform(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """The paper's rule (section 3): with cross_layer_prob a donor uniform in {0..l-1}."""
    own = _own(pick)
    return np.where(reads_donor, _pick_below(pick, own), own)


def _window(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """With cross_layer_prob a donor uniform in the `window` layers below the reader."""
    own = _own(pick)
    assert routing.window is not None
    reach = np.minimum(own, routing.window)
    return np.where(reads_donor, own - 1 - _pick_below(pick, reach), own)


def _strategy(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """Draw the retained layers, then read as inference does: mu(l) = the nearest retained layer at or below l.

    Each layer l > 0 is dropped with cross_layer_prob, so that is the probability of reading another layer,
    as under `uniform`; at most one layer's keys and values are read across any depth.
    """
    own = _own(pick)
    return np.maximum.accumulate(np.where(reads_donor, 0, own), axis=-1)


def _leader(pick: Uniforms, group_size: int) -> Donors:
    own = _own(pick)
    return own - own % group_size


def _cla(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """CLA@k: groups of k consecutive layers always read the first one's keys and values."""
    assert routing.group_size is not None
    return _leader(pick, routing.group_size)


def _rd_cla(routing: RoutingConfig, reads_donor: Flags, pick: Uniforms) -> Donors:
    """RD-CLA@k: the groups of CLA, with a coin per layer between the group's leader and its own."""
    assert routing.group_size is not None
    own = _own(pick)
    return np.where(reads_donor, _leader(pick, routing.group_size), own)


POLICIES: dict[str, Callable[[RoutingConfig, Flags, Uniforms], Donors]] = {
    "none": _none,
    "uniform": _uniform,
    "strategy": _strategy,
    "window": _window,
    "cla": _cla,
    "rd_cla": _rd_cla,
}


def draw_donors(routing: RoutingConfig, coin: Uniforms, pick: Uniforms) -> Donors:
    """Donors of every micro-batch.

    Args:
        routing: the policy and its parameters.
        coin, pick: float [Q, L], uniform in [0, 1). Layer 0's are drawn but not used: it has no donor.

    Returns:
        int64 [Q, L] with donors[q, l] <= l and donors[q, 0] == 0.
    """
    reads_donor = coin < (routing.cross_layer_prob or 0.0)
    donors = np.broadcast_to(POLICIES[routing.policy](routing, reads_donor, pick), coin.shape).copy()
    donors[:, 0] = 0
    return donors
