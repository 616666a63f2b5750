"""One case of the parity matrix, on the ranks of its layout: train, and report what can be compared.

Ranks return the shards they hold; `skvr_dist.lab.verify.compare` puts them together.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skvr_dist.config.layouts import zero_stage_in_use
from skvr_dist.lab.verify.cases import Case
from skvr_dist.lab.verify.first_use import first_use_blocks
from skvr_dist.model.modules import TensorShard
from skvr_dist.parallel.engine.gradients import gather_gradient, gradient_tensors
from skvr_dist.parallel.engine.optimizers import (
    gather_master,
    gather_parameter,
    optimizer_tensors,
    parameter_tensors,
)
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.build import build_engine
from skvr_dist.train.plans import plan_stream

Held = dict[str, tuple[TensorShard, Tensor]]
"""What a rank holds of each weight, by canonical name."""


@dataclass
class RankResult:
    """What one rank saw in one case."""

    stage: int
    evaluation: float | None
    """Mean loss of the first step's batch before training, at `Case.evaluated`."""
    losses: list[float]
    norms: list[float]
    donors: list[list[list[int]]]
    """The routing plans it used, [step][row][layer]."""
    initial: Held
    gradients: list[Held]
    """Gradients of every step, before clipping."""
    weights: Held
    """Weights after the last step."""
    masters: Held
    """The optimizer's fp32 weights after the last step; in an fp32 run the weights themselves."""
    sent_bytes: int
    backward_passes: int
    bytes: dict[str, int]
    """Bytes that parameters, gradients and optimizer state occupy, by kind."""
    expected_bytes: dict[str, int]
    """Bytes that this rank of the layout should hold, by kind."""
    state_dtypes: set[torch.dtype]


def run_cases(cases: list[Case], first_use: bool = False) -> list[RankResult]:
    """Train every case on this rank, one after the other; they are of one layout."""
    with first_use_blocks() if first_use else contextlib.nullcontext():
        return [run_case(case, evaluates=not first_use) for case in cases]


def run_case(case: Case, evaluates: bool = True) -> RankResult:
    """Train a case on this rank's place of its layout; collective over the layout's ranks.

    Args:
        evaluates: whether an evaluation comes first; then training is not what uses groups and channels first.
    """
    config = case.config()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    stage = engine.stage
    parameters = dict(stage.decoder.named_parameters())
    initial = {name: gather_parameter(parameter) for name, parameter in parameters.items()}
    gradients: list[Held] = []
    sizes: dict[str, int] = {}

    def look() -> None:
        if not gradients:
            sizes["gradients"] = _bytes(gradient_tensors(engine.optimizer, engine.stage))
        gradients.append(_held(stage.shards, {name: gather_gradient(p) for name, p in parameters.items()}))

    batches = case.micro_batches()
    evaluation = engine.evaluate(batches[0][mesh.dp_rank :: mesh.dp_size], case.evaluated) if evaluates else None
    sent_before = engine.sent_bytes
    engine.before_update = look
    plans = plan_stream(config, mesh, first_step=0)
    result: dict[str, list[Any]] = {"losses": [], "norms": [], "donors": []}
    for batch in batches:
        plan = plans.next()
        result["donors"].append(plan.donors.tolist())
        result["losses"].append(engine.train_step(iter(batch[mesh.dp_rank :: mesh.dp_size]), plan))
        result["norms"].append(engine.gradient_norm)
    plans.close()
    weights = {name: gather_parameter(parameter) for name, parameter in parameters.items()}
    masters = weights
    if case.precision == "bf16":
        masters = {name: gather_master(parameter) for name, parameter in parameters.items()}
    states = optimizer_tensors(engine)
    sizes["parameters"] = _bytes(parameter_tensors(engine))
    sizes["optimizer"] = _bytes(states)
    measured = RankResult(
        stage=mesh.pp_rank,
        evaluation=evaluation,
        **result,
        initial=_held(stage.shards, initial),
        gradients=gradients,
        weights=_held(stage.shards, weights),
        masters=_held(stage.shards, masters),
        sent_bytes=engine.sent_bytes - sent_before,
        backward_passes=engine.backward_passes,
        bytes=sizes,
        expected_bytes=expected_bytes(case, mesh, sum(t.numel() for t in initial.values())),
        state_dtypes={tensor.dtype for tensor in states},
    )
    engine.destroy()
    gc.collect()
    return measured


def _held(shards: dict[str, TensorShard], tensors: dict[str, Tensor]) -> Held:
    return {name: (shards[name], shards[name].unpadded(tensor.cpu()).clone()) for name, tensor in tensors.items()}


def expected_bytes(case: Case, mesh: Mesh, parameters: int) -> dict[str, int]:
    """Bytes that this rank should hold, from its number of parameters (before ZeRO shares them out).

    DeepSpeed keeps fp32 master weights apart from the parameters from ZeRO-1 on, in fp32 runs too; in bf16 with ZeRO-1
    whole fp32 gradients; and with an offloaded optimizer, in bf16 with ZeRO-1 and 2, the fp32
    gradients that the host gets a copy of.
    """
    config, bf16 = case.config(), case.precision == "bf16"
    zero, offload = zero_stage_in_use(config, mesh.dp_size), config.offloads_optimizer
    shared = parameters // mesh.dp_size
    adam = 8
    gradients = 4 * (shared if zero >= 1 else parameters)
    if bf16 and offload and zero < 3:
        gradients = 8 * shared
    elif bf16 and zero == 1:
        gradients = 4 * parameters
    return {
        "parameters": (2 if bf16 else 4) * (shared if zero == 3 else parameters),
        "gradients": gradients,
        "optimizer": (adam + 4) * shared if zero >= 1 else adam * parameters,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    spans: dict[int, int] = {}
    for tensor in tensors:
        spans[tensor.data_ptr()] = max(spans.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(spans.values())
