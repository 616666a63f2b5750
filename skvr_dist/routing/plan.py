"""The routing plan of one step: which layer's keys and values each layer reads, per micro-batch or per sequence.

Shapes: Q micro-batches of the global batch, R rows of each, N = Q x R, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skvr_dist.errors import UserError
from skvr_dist.routing.config import RoutingConfig
from skvr_dist.routing.liveness import read_layers
from skvr_dist.routing.policies import POLICIES, Donors, Uniforms
from skvr_dist.schedule import value_at


@dataclass(frozen=True)
class RoutingPlan:
    """`donors[n, l]`, int [N, L], is the layer that layer l reads in row n; always <= l.

    A micro-batch has one row, for all of its sequences, or one for each of them. Rows are in the order of the sequences
    of the step's global batch, whichever rank runs them, so the plan does not depend on the layout.

    Raises:
        UserError: a donor later than its reader, or a negative one.
    """

    donors: NDArray[np.int64]
    rows_per_micro_batch: int = 1
    """R: 1, or the sequences of a micro-batch."""

    def __post_init__(self) -> None:
        if self.donors.ndim != 2 or len(self.donors) % self.rows_per_micro_batch:
            raise UserError(
                f"a routing plan has shape [micro-batches x {self.rows_per_micro_batch}, layers], got "
                f"{self.donors.shape}"
            )
        layers = np.arange(self.donors.shape[1])
        wrong = np.argwhere((self.donors > layers) | (self.donors < 0))
        if len(wrong):
            row, reader = (int(i) for i in wrong[0])
            raise UserError(
                f"routing plan, {self.place_of(row)}: layer {reader} cannot read layer {self.donors[row, reader]}; "
                f"a donor must be one of the layers 0 to {reader}"
            )

    @property
    def num_micro_batches(self) -> int:
        """Q: micro-batches of the global batch."""
        return len(self.donors) // self.rows_per_micro_batch

    @property
    def num_layers(self) -> int:
        """L: layers of the whole decoder."""
        return self.donors.shape[1]

    def of_micro_batch(self, q: int) -> tuple[tuple[int, ...], ...]:
        """The donors of global micro-batch q, [R][L]."""
        rows = self.donors[q * self.rows_per_micro_batch : (q + 1) * self.rows_per_micro_batch]
        return tuple(map(tuple, rows.tolist()))

    def place_of(self, row: int) -> str:
        """Where a row belongs, in words."""
        q, sequence = divmod(row, self.rows_per_micro_batch)
        return f"micro-batch {q}" + (f", sequence {sequence}" if self.rows_per_micro_batch > 1 else "")

    @property
    def cross_layer_share(self) -> float:
        """Share of the reads (over all rows and layers) that go to another layer."""
        return float((self.donors != np.arange(self.num_layers)).mean())

    @property
    def skipped_kv_share(self) -> float:
        """Share of the key/value projections, each of a whole micro-batch, that nobody reads and nobody computes."""
        micro_batches = self.donors.reshape(-1, self.rows_per_micro_batch, self.num_layers)
        return 1.0 - float(np.mean([read_layers(donors) for donors in micro_batches]))


def _uniforms(seed: int, step: int, row: int, count: int) -> Uniforms:
    """`count` numbers in [0, 1), a pure function of (seed, step, row).

    Philox is counter-based (Salmon et al., SC 2011): the seed is its key, and step and row are words of
    its counter, whose lowest word counts the draws. The raw 64-bit stream is fixed by the algorithm, unlike
    the distribution methods of numpy, which may change between releases.
    """
    bits = np.random.Philox(key=seed, counter=[0, 0, row, step]).random_raw(count)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_donors(routing: RoutingConfig, coin: Uniforms, pick: Uniforms, prob: Uniforms) -> Donors:
    """Donors of every row.

    Args:
        routing: the policy and its parameters.
        coin, pick: float [N, L], uniform in [0, 1). Layer 0's are drawn but not used: it has no donor.
        prob: float [N, 1], each row's probability that a layer reads a donor.

    Returns:
        int64 [N, L] with donors[n, l] <= l and donors[n, 0] == 0.
    """
    reads_donor = coin < prob
    size = routing.window or routing.group_size or 0
    donors = np.broadcast_to(POLICIES[routing.policy].rule(reads_donor, pick, size), coin.shape).copy()
    donors[:, 0] = 0
    return donors


def draw_plan(
    routing: RoutingConfig,
    *,
    num_layers: int,
    num_micro_batches: int,
    seed: int,
    step: int,
    schedule_steps: int | None = None,
    micro_batch_size: int = 1,
) -> RoutingPlan:
    """Draw the plan of one optimizer step: a pure function of (seed, step), the same on any machine.

    docs/draws.md has the rule to the bit; `skvr_dist.lab.verify.draws` follows it a second time.

    Args:
        step: from 0 on.
        schedule_steps: the steps that schedules over shares of the run are spread over, if there are any.
        micro_batch_size: sequences of a micro-batch, each of which has a row where `routing.draws_per` is sequence.
    """
    rows = micro_batch_size if routing.draws_per == "sequence" else 1
    u = np.stack([_uniforms(seed, step, row, 2 * num_layers + 1) for row in range(num_micro_batches * rows)])
    coin, pick, full_coin = u[:, :num_layers], u[:, num_layers:-1], u[:, -1:]
    prob = value_at(routing.cross_layer_prob or 0.0, step, schedule_steps)
    full_share = value_at(routing.full_retention_share, step, schedule_steps)
    return RoutingPlan(draw_donors(routing, coin, pick, np.where(full_coin < full_share, 0.0, prob)), rows)


def fixed_plan(donors: tuple[int, ...] | NDArray[np.int64], num_micro_batches: int) -> RoutingPlan:
    """The same donors in every micro-batch, as for evaluation at a cache strategy."""
    return RoutingPlan(np.tile(np.asarray(donors, dtype=np.int64), (num_micro_batches, 1)))
