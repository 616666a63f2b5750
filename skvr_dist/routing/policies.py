"""Routing policies: what each is called, which parameters it takes, how it draws a donor for each layer.

Every rule is a function of two draws per layer, whether it reads a donor and which one, so that a row of a plan is
a pure function of its random bits. Layer 0 always reads its own keys and values. docs/draws.md has it to the bit.

A new policy is a rule here, its row in `POLICIES` and its name in `PolicyName`. To be proven it also needs the
reference's own draw (`skvr_dist.lab.verify.draws`) and parameters in the matrix (`skvr_dist.lab.verify.cases`).

Shapes: N rows of a plan (one for each micro-batch, or for each sequence), L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Donors = NDArray[np.int64]
Flags = NDArray[np.bool_]
Uniforms = NDArray[np.float64]
PolicyName = Literal["none", "uniform", "strategy", "window", "cla", "rd_cla"]


@dataclass(frozen=True)
class Policy:
    """What the rest of the project knows about a policy."""

    name: PolicyName
    parameters: tuple[str, ...]
    """The fields of `RoutingConfig` that it takes; every one of them is required, and no other is accepted."""
    rule: Callable[[Flags, Uniforms, int], Donors]
    """Donors, int64 [N, L], of which layers read one, bool [N, L]; of where in its reach each donor lies, float [N, L]
    in [0, 1); and of the `window` or `group_size`, 0 for a policy that takes neither. Layer 0's are not used."""
    words: str = ""
    """What a layer reads instead of its own keys and values, for the model card."""
    reads_own: bool = True
    """Whether every layer reads its own keys and values at times (below a cross_layer_prob of 1), so that a trained
    model can run at full retention."""

    @property
    def is_random(self) -> bool:
        """Whether donors are drawn anew for each micro-batch (or sequence)."""
        return "cross_layer_prob" in self.parameters


def _own(pick: Uniforms) -> Donors:
    """int64 [L]: every layer's own number."""
    return np.arange(pick.shape[-1], dtype=np.int64)


def _pick_below(pick: Uniforms, count: Donors) -> Donors:
    """floor(pick * count), an integer uniform in [0, count) for each layer."""
    return np.minimum((pick * count).astype(np.int64), np.maximum(count - 1, 0))


def _leader(pick: Uniforms, group_size: int) -> Donors:
    """int64 [L]: the first layer of each layer's group."""
    own = _own(pick)
    return own - own % group_size


def _none(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """Standard training: every layer reads its own."""
    return _own(pick)


def _uniform(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """The paper's rule (section 3): with cross_layer_prob a donor uniform in {0..l-1}."""
    own = _own(pick)
    return np.where(reads_donor, _pick_below(pick, own), own)


def _strategy(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """Draw the retained layers, then read as inference does: mu(l) = the nearest retained layer at or below l.

    Each layer l > 0 is dropped with cross_layer_prob, so that is the probability of reading another layer,
    as under `uniform`; at most one layer's keys and values are read across any depth.
    """
    own = _own(pick)
    return np.maximum.accumulate(np.where(reads_donor, 0, own), axis=-1)


def _window(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """With cross_layer_prob a donor uniform in the `window` layers below the reader."""
    own = _own(pick)
    reach = np.minimum(own, size)
    return np.where(reads_donor, own - 1 - _pick_below(pick, reach), own)


def _cla(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """CLA@k: groups of k consecutive layers always read the first one's keys and values."""
    return _leader(pick, size)


def _rd_cla(reads_donor: Flags, pick: Uniforms, size: int) -> Donors:
    """RD-CLA@k: the groups of CLA, with a coin per layer between the group's leader and its own."""
    return np.where(reads_donor, _leader(pick, size), _own(pick))


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("none", (), _none),
        Policy(
            "uniform",
            ("cross_layer_prob",),
            _uniform,
            words="with probability `cross_layer_prob` a layer read those of an earlier layer, each equally likely",
        ),
        Policy(
            "strategy",
            ("cross_layer_prob",),
            _strategy,
            words="with probability `cross_layer_prob` a layer gave up its own and read the nearest ones kept before "
            "it",
        ),
        Policy(
            "window",
            ("cross_layer_prob", "window"),
            _window,
            words="with probability `cross_layer_prob` a layer read those of one of the `window` layers before it",
        ),
        Policy(
            "cla",
            ("group_size",),
            _cla,
            words="the layers of a group of `group_size` always read those of its first layer",
            reads_own=False,
        ),
        Policy(
            "rd_cla",
            ("cross_layer_prob", "group_size"),
            _rd_cla,
            words="with probability `cross_layer_prob` a layer read those of the first layer of its group of "
            "`group_size`",
        ),
    )
}
"""Every policy by its name, in the order in which they are listed to users."""
