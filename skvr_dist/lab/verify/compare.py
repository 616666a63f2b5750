"""Compare the ranks' results of a case with the single-process reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skvr_dist.lab.verify import draws, reference
from skvr_dist.lab.verify.cases import BATCH, DISTILLATIONS, MICRO_BATCHES, OPTIMIZER, SEED, Case
from skvr_dist.lab.verify.measure import Held, RankResult
from skvr_dist.parallel.split import stage_bounds
from skvr_dist.routing import crossing_elements


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors."""

    loss: float
    norm: float
    gradient: float
    later_gradients: float
    gradient_scale: float
    update: float = 1e-6
    """A step rounds a weight about three times, to 2^-24 each: over 20 steps, sqrt(60) * 2^-24 = 5e-7. What AdamW is,
    its learning rate, clipping and decay, has no part in that, so this is as sharp in bf16."""
    weights: float = math.inf


# Gradients of later steps are those at weights that differ already: a few times what they may in the first.
FP32 = Tolerance(loss=1e-6, norm=1e-5, gradient=1e-5, later_gradients=5e-5, gradient_scale=5e-5, weights=1e-5)
# With the usual eps, Adam makes whole steps of gradients however small. A relative error of e in a weight's gradients
# leaves the sign of about one element in 1 / e undecided, and that element may go two learning rates astray: no bound
# on the weights themselves would be both safe and sharp. They are bounded in two parts: what the gradients were, in
# every step, and what AdamW made of them (`update`). Gradients of later steps feel one such element: 2 * 1e-3 in a
# matrix of norm 4 is 5e-4. Losses and norms hardly do, since its gradient is so small.
FP32_USUAL_EPS = dataclasses.replace(FP32, later_gradients=1e-3, gradient_scale=1e-3, weights=math.inf)
# bf16 rounds to 2^-9, and a gradient passes some hundred roundings: sqrt(100) * 2^-9 is 2 %, and differences, as in a
# softmax's gradient, multiply that: 2 to 4 % of a weight's gradient in most steps, 10 % where a small weight's gradient
# happens to be small. That hides an error of 3 % in any single number. But rounding errors do not point along the
# gradient: over N = elements x steps numbers they change its length along the reference's by 4 % / sqrt(N). N is 96
# for the smallest weights, norms of heads, in the matrix: 0.4 %. So a bound of 1.5 % is 3.7 times what rounding does,
# and as far below what an error of 3 % does. The gradients' norm and the loss are sums over still more.
BF16 = Tolerance(loss=1e-3, norm=1e-2, gradient=0.15, later_gradients=0.15, gradient_scale=0.015)


def tolerance_of(case: Case) -> Tolerance:
    """The tolerance of a case, by its precision and Adam's eps."""
    if case.precision == "bf16":
        return BF16
    return FP32 if case.adam_eps >= OPTIMIZER["eps"] else FP32_USUAL_EPS


# ZeRO pads its partitions; on a decoder of this size that shows. A layout that held a whole instead of a share, or a
# copy too many, would be off by 1.25 times or more.
_BYTES_RATIO = (0.99, 1.05)


@dataclass(frozen=True)
class Outcome:
    """One line of the table: largest relative errors over all ranks, steps and weights."""

    case: Case
    same_donors: bool
    """Whether every rank used the donors that the reference drew."""
    initial: float
    evaluation: float
    """Error of the loss at a cache strategy, with the initial weights."""
    loss: float
    gradient: float
    """Error of the first step's gradients."""
    worst_gradient: str
    """The weight with the largest error in that gradient."""
    later_gradients: float
    gradient_scale: float
    """How far the ranks' gradients of a weight are too long or too short along the reference's, over all steps."""
    norm: float
    update: float
    """Error of the weights after the last step, against AdamW on the gradients that the ranks had."""
    weights: float
    """The same against the reference's own training."""
    rounded: bool
    """Whether the weights are the optimizer's fp32 ones, rounded to the precision of the run."""
    bytes_ratio: dict[str, float]
    """Measured over expected bytes of parameters, gradients and optimizer state, on the rank furthest off."""
    crossing_ratio: float
    """Bytes sent over the liveness bound, over all boundaries; 1 without a pipeline."""
    backward_ratio: float
    """Backward passes over micro-batches."""

    @property
    def misses(self) -> list[str]:
        """What is out of tolerance."""
        tolerance = tolerance_of(self.case)
        right = {
            "donors": self.same_donors,
            "initial weights": self.initial == 0.0,
            "evaluation": self.evaluation <= tolerance.loss,
            "loss": self.loss <= tolerance.loss,
            "gradient": self.gradient <= tolerance.gradient,
            "later gradients": self.later_gradients <= tolerance.later_gradients,
            "gradient scale": self.gradient_scale <= tolerance.gradient_scale,
            "gradient norm": self.norm <= tolerance.norm,
            "update": self.update <= tolerance.update,
            "weights": self.weights <= tolerance.weights,
            "rounded weights": self.rounded,
            "crossing bytes": self.crossing_ratio == 1.0,
            "backward passes": self.backward_ratio == 1.0,
        }
        for kind, ratio in self.bytes_ratio.items():
            right[f"bytes of {kind}"] = _BYTES_RATIO[0] <= ratio <= _BYTES_RATIO[1]
        return [name for name, met in right.items() if not met]


def how_to_train(case: Case) -> dict[str, Any]:
    """AdamW of a case: what the reference's optimizer takes, and the learning rate of every step."""
    rates = [
        reference.learning_rate(
            step,
            peak=case.learning_rate,
            steps=case.steps,
            warmup_steps=case.warmup_steps,
            floor=case.min_learning_rate_ratio,
            decay=case.learning_rate_decay,
            decay_steps=case.decay_steps,
        )
        for step in range(case.steps)
    ]
    return {"clip": case.clip, "optimizer": {**OPTIMIZER, "eps": case.adam_eps}, "learning_rates": rates}


def how_to_distil(case: Case) -> reference.Distillation | None:
    """What a case's distilled micro-batches learn, as the reference takes it."""
    if not case.distillation:
        return None
    section = {"temperature": 1.0, "full_weight": 1.0, "passes": ["routed"], **DISTILLATIONS[case.distillation]}
    donors = {"routed": None, "prefix:1": [0] * case.shape["num_hidden_layers"]}
    return reference.Distillation(
        section["weight"],
        section["temperature"],
        section["full_weight"],
        [donors[name] for name in section["passes"]],
    )


def passes(case: Case, plans: list[list[list[int]]]) -> list[tuple[list[list[int]], bool]]:
    """The rows of donors of every pass of a case, and whether it runs back."""
    how, found = how_to_distil(case), []
    for plan, marks in zip(plans, case.distilled(), strict=True):
        for q, mark in enumerate(marks):
            rows = plan[q * case.rows : (q + 1) * case.rows]
            if how and mark:
                found.append(([list(range(len(rows[0])))], how.full_weight > 0))
                found += [([each] if each else rows, True) for each in how.passes]
            else:
                found.append((rows, True))
    return found


@functools.cache
def expected(case: Case) -> dict[str, Any]:
    """What the reference gets on one rank: initial weights, donors, losses, norms, gradients and final weights."""
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    # In bf16 the fp32 master weights begin where the rounded weights are.
    initial = {name: weight.to(dtype).float() for name, weight in draws.initial_weights(case.shape, SEED).items()}
    layers = case.shape["num_hidden_layers"]
    plans = [
        draws.plan(case.routing, layers, MICRO_BATCHES * case.rows, seed=SEED, step=step, steps=case.steps)
        for step in range(case.steps)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small threads only wait for each other
    batches, labelled = [_by_row(case, batch) for batch in case.batches()], [_by_row(case, m) for m in case.labelled()]
    trained = reference.train(
        initial,
        case.shape,
        batches,
        plans,
        labelled=labelled,
        separate_at=case.separate_at,
        dtype=dtype,
        distillation=how_to_distil(case),
        distilled=[[mark for mark in marks for _ in range(case.rows)] for marks in case.distilled()],
        **how_to_train(case),
    )
    evaluation = reference.evaluation_loss(
        initial, case.shape, batches[0], case.evaluated, labelled=labelled[0], separate_at=case.separate_at
    )
    torch.set_num_threads(threads)
    return {**trained, "evaluation": evaluation, "initial": initial, "donors": plans}


def _by_row(case: Case, batch: Tensor) -> Tensor:
    """A global batch [Q, B, ...] as micro-batches of a row each [Q * R, B / R, ...], which the reference trains on."""
    return batch.reshape(-1, BATCH // case.rows, *batch.shape[2:])


def compare(case: Case, results: Sequence[RankResult]) -> Outcome:
    """Compare what the ranks of a layout returned with the reference.

    Raises:
        AssertionError: the ranks together do not hold every weight.
    """
    wanted = expected(case.on_one_rank)
    by_step = [[result.gradients[step] for result in results] for step in range(case.steps)]
    errors = [_errors(held, gradients) for held, gradients in zip(by_step, wanted["gradients"], strict=True)]
    first, *later = errors
    worst = max(first, key=lambda name: first[name])
    updated = _updated(case, wanted["initial"], [_whole(held, wanted["initial"]) for held in by_step])
    return Outcome(
        case=case,
        same_donors=all(result.donors == wanted["donors"] for result in results),
        initial=max(_errors([r.initial for r in results], wanted["initial"]).values()),
        evaluation=max(
            (_relative([r.evaluation], [wanted["evaluation"]]) for r in results if r.evaluation is not None),
            default=0.0,
        ),
        loss=max(_relative(r.losses, wanted["losses"]) for r in results),
        gradient=first[worst],
        worst_gradient=worst,
        later_gradients=max([error for step in later for error in step.values()], default=0.0),
        gradient_scale=max(gradient_scales(by_step, wanted["gradients"]).values()),
        norm=max(_relative(r.norms, wanted["norms"]) for r in results),
        update=max(_errors([r.masters for r in results], updated).values()),
        weights=max(_errors([r.weights for r in results], wanted["weights"]).values()),
        rounded=all(_same(r.weights, r.masters) for r in results),
        bytes_ratio={
            kind: max((r.bytes[kind] / r.expected_bytes[kind] for r in results), key=lambda ratio: abs(ratio - 1))
            for kind in ("parameters", "gradients", "optimizer")
        },
        crossing_ratio=_crossing_ratio(case, results),
        backward_ratio=sum(r.backward_passes for r in results) / _backward_passes(case, results[0].donors),
    )


def _same(weights: Held, masters: Held) -> bool:
    return all(torch.equal(weight, masters[name][1].to(weight.dtype)) for name, (_, weight) in weights.items())


def _whole(held: Sequence[Held], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every weight (or gradient) put together from the ranks' shards."""
    whole = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for rank in held:
        for name, (shard, tensor) in rank.items():
            shard.cut(whole[name]).copy_(tensor)
    return whole


def _updated(case: Case, initial: dict[str, Tensor], gradients: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights that AdamW makes of the initial ones with these gradients."""
    how = how_to_train(case)
    adamw = reference.AdamW(initial, clip=how["clip"], **how["optimizer"])
    for step, rate in zip(gradients, how["learning_rates"], strict=True):
        adamw.step(step, rate)
    return adamw.weights


def gradient_scales(by_step: Sequence[Sequence[Held]], wanted: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """How far <a rank's gradient, reference's> / <reference's, reference's> is from 1 for each weight, over all steps.

    Of the ranks that hold it, or a shard of it, the one that is furthest off counts.
    """
    scales = dict.fromkeys(wanted[0], 0.0)
    for rank in zip(*by_step, strict=True):
        for name, (shard, _) in rank[0].items():
            found = torch.stack([held[name][1] for held in rank]).double()
            right = torch.stack([shard.cut(gradients[name]) for gradients in wanted]).double()
            size = float(right.square().sum())
            if size:
                scales[name] = max(scales[name], _finite(abs(float((found * right).sum()) / size - 1)))
    return scales


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
            square = _finite(float((tensor.float() - shard.cut(wanted[name])).square().sum()))
            place = (shard.dim, shard.start)
            squares[name][place] = max(square, squares[name].get(place, 0.0))
    for name, tensor in wanted.items():
        assert covered[name].all(), f"no rank holds all of {name}"
        difference, scale = sum(squares[name].values()) ** 0.5, float(tensor.norm())
        errors[name] = 0.0 if difference == 0.0 else difference / scale if scale else float("inf")
    return errors


def _relative(actual: Sequence[float], wanted: Sequence[float]) -> float:
    return max(_finite(abs(a - w) / abs(w)) for a, w in zip(actual, wanted, strict=True))


def _finite(error: float) -> float:
    """The error, or infinity if it is not a number, which `max` would pass over."""
    return error if math.isfinite(error) else math.inf


def _crossing_ratio(case: Case, results: Sequence[RankResult]) -> float:
    config = case.config()
    model, kv_copies = config.model, max(config.parallel.tensor // config.model.num_key_value_heads, 1)
    size = {"hidden_size": model.hidden_size, "kv_size": model.kv_size * kv_copies}
    cuts = [stop for _, stop in stage_bounds(model, config.parallel, config.data.sequence_length)[:-1]]
    bound = sum(
        crossing_elements(donors, cut, tokens=BATCH * case.sequence // len(rows), **size)
        for cut in cuts
        for rows, _ in passes(case, results[0].donors)
        for donors in rows
    )
    bytes_per_element = 2 if case.precision == "bf16" else 4
    sent = sum(result.sent_bytes for result in results)
    return sent / (bound * bytes_per_element) if bound else 1.0 + sent


def _backward_passes(case: Case, plans: list[list[list[int]]]) -> int:
    """Backward passes over all ranks: one per pass that has any, stage and tensor-parallel rank."""
    parallel = case.config().parallel
    return sum(back for _, back in passes(case, plans)) * parallel.pipeline * parallel.tensor
