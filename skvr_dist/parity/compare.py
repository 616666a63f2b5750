"""Hold the ranks' results of a case against the single-process reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.parallel.partition import stage_bounds
from skvr_dist.parity import reference
from skvr_dist.parity.cases import BATCH, CLIP, MICRO_BATCHES, OPTIMIZER, SEED, SEQUENCE, Case, batches, labelled
from skvr_dist.parity.measure import Held, RankResult
from skvr_dist.routing import crossing_elements


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors."""

    loss: float
    norm: float
    gradient: float
    weights: float


TOLERANCES = {
    "fp32": Tolerance(loss=1e-6, norm=1e-5, gradient=1e-5, weights=1e-5),
    # bf16 has 8 bits of mantissa; this is what one process in bf16 shows against fp32, most for head norms, with room.
    "bf16": Tolerance(loss=1e-3, norm=1e-2, gradient=1e-1, weights=1e-2),
}
# ZeRO pads its partitions; on a decoder of this size that shows. A layout that held a whole instead of a share, or a
# copy too many, would be off by 1.25 times or more.
_BYTES_RATIO = (0.99, 1.05)


@dataclass(frozen=True)
class Outcome:
    """One line of the table: largest relative errors over all ranks, steps and weights."""

    case: Case
    initial: float
    loss: float
    gradient: float
    worst_gradient: str
    """The weight with the largest error in its gradient."""
    norm: float
    weights: float
    bytes_ratio: dict[str, float]
    """Measured over expected bytes of parameters, gradients and optimizer state, on the rank furthest off."""
    crossing_ratio: float
    """Bytes sent over the liveness bound, over all boundaries; 1 without a pipeline."""
    backward_ratio: float
    """Backward passes over micro-batches."""

    @property
    def misses(self) -> list[str]:
        """What is out of tolerance."""
        tolerance = TOLERANCES[self.case.precision]
        wrong = {
            "initial weights": self.initial > (4e-3 if self.case.precision == "bf16" else 0.0),
            "loss": self.loss > tolerance.loss,
            "gradient": self.gradient > tolerance.gradient,
            "gradient norm": self.norm > tolerance.norm,
            "weights": self.weights > tolerance.weights,
            "crossing bytes": self.crossing_ratio != 1.0,
            "backward passes": self.backward_ratio != 1.0,
        }
        for kind, ratio in self.bytes_ratio.items():
            wrong[f"bytes of {kind}"] = not _BYTES_RATIO[0] <= ratio <= _BYTES_RATIO[1]
        return [name for name, missed in wrong.items() if missed]


@functools.cache
def expected(family: str, tied: bool, policy: str, steps: int, ragged: bool = False) -> dict[str, Any]:
    """What the reference gets: initial weights, donors, losses, norms, gradients of step 1 and final weights."""
    case = Case("single", policy, tied=tied, family=family, ragged=ragged, steps=steps)
    decoder = Decoder(ModelConfig.model_validate(case.shape))
    initialize(decoder, SEED)
    initial = {name: p.detach() for name, p in decoder.named_parameters()}
    config = case.config()
    plans = [config.plan(step).donors.tolist() for step in range(steps)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small threads only wait for each other
    trained = reference.train(
        initial, case.shape, batches(steps), plans, clip=CLIP, optimizer=OPTIMIZER, labelled=labelled(case)
    )
    torch.set_num_threads(threads)
    return {**trained, "initial": initial, "donors": plans}


def compare(case: Case, results: Sequence[RankResult]) -> Outcome:
    """Hold what the ranks of a layout returned against the reference.

    Raises:
        AssertionError: ranks used another plan, or together do not hold every weight.
    """
    wanted = expected(case.family, case.tied, case.policy, case.steps, case.ragged)
    assert all(result.donors == wanted["donors"] for result in results), "a rank used another routing plan"
    gradients = _errors([r.gradients for r in results], wanted["gradients"])
    worst = max(gradients, key=lambda name: gradients[name])
    return Outcome(
        case=case,
        initial=max(_errors([r.initial for r in results], wanted["initial"]).values()),
        loss=max(_relative(r.losses, wanted["losses"]) for r in results),
        gradient=gradients[worst],
        worst_gradient=worst,
        norm=max(_relative(r.norms, wanted["norms"]) for r in results),
        weights=max(_errors([r.weights for r in results], wanted["weights"]).values()),
        bytes_ratio={
            kind: max((r.bytes[kind] / r.expected_bytes[kind] for r in results), key=lambda ratio: abs(ratio - 1))
            for kind in ("parameters", "gradients", "optimizer")
        },
        crossing_ratio=_crossing_ratio(case, results),
        backward_ratio=sum(r.backward_passes for r in results) / _backward_passes(case),
    )


def _errors(held: Sequence[Held], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each weight, put together from its shards.

    Ranks that hold the same shard must agree: every one of them is put in place and measured.
    """
    errors = dict.fromkeys(wanted, 0.0)
    covered = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in wanted.items()}
    squares: dict[str, dict[tuple[int, int], float]] = {name: {} for name in wanted}
    for rank in held:
        for name, (shard, tensor) in rank.items():
            shard.cut(covered[name]).fill_(True)
            square = float((tensor.float() - shard.cut(wanted[name])).square().sum())
            place = (shard.dim, shard.start)
            squares[name][place] = max(square, squares[name].get(place, 0.0))
    for name, tensor in wanted.items():
        assert covered[name].all(), f"no rank holds all of {name}"
        difference, scale = sum(squares[name].values()) ** 0.5, float(tensor.norm())
        errors[name] = 0.0 if difference == 0.0 else difference / scale if scale else float("inf")
    return errors


def _relative(actual: Sequence[float], wanted: Sequence[float]) -> float:
    return max(abs(a - w) / abs(w) for a, w in zip(actual, wanted, strict=True))


def _crossing_ratio(case: Case, results: Sequence[RankResult]) -> float:
    config = case.config()
    model, kv_copies = config.model, max(config.parallel.tensor // config.model.num_key_value_heads, 1)
    size = {"tokens": BATCH * SEQUENCE, "hidden_size": model.hidden_size, "kv_size": model.kv_size * kv_copies}
    cuts = [stop for _, stop in stage_bounds(model, config.parallel)[:-1]]
    rows = [donors for step in results[0].donors for donors in step]
    bound = sum(crossing_elements(donors, cut, **size) for cut in cuts for donors in rows)
    bytes_per_element = 2 if case.precision == "bf16" else 4
    sent = sum(result.sent_bytes for result in results)
    return sent / (bound * bytes_per_element) if bound else 1.0 + sent


def _backward_passes(case: Case) -> int:
    """Over all ranks, one per micro-batch, stage and tensor-parallel rank."""
    parallel = case.config().parallel
    return case.steps * MICRO_BATCHES * parallel.pipeline * parallel.tensor
