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
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from skvr_dist.lab.verify.cases import Case
from skvr_dist.lab.verify.first_use import first_use_blocks
from skvr_dist.model.modules import Shard
from skvr_dist.parallel.engine.engine import RoutedPipelineEngine
from skvr_dist.parallel.guard import gradient_tensors
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.build import build_engine
from skvr_dist.train.plans import plan_stream

Held = dict[str, tuple[Shard, Tensor]]
"""What a rank holds of each weight, by canonical name."""


@dataclass
class RankResult:
    """What one rank saw in one case."""

    stage: int
    losses: list[float]
    norms: list[float]
    donors: list[list[list[int]]]
    """The routing plans it used, [step][micro-batch][layer]."""
    initial: Held
    gradients: list[Held]
    """Of every step, before clipping."""
    weights: Held
    """After the last step."""
    masters: Held
    """The fp32 weights that the optimizer keeps, then; the weights themselves in fp32."""
    sent_bytes: int
    backward_passes: int
    bytes: dict[str, int]
    """What parameters, gradients and optimizer state occupy."""
    expected_bytes: dict[str, int]
    """What the layout should hold of them."""
    state_dtypes: set[torch.dtype]


def run_cases(cases: list[Case], first_use: bool = False) -> list[RankResult]:
    """Train every case on this rank, one after the other; they are of one layout."""
    with first_use_blocks() if first_use else contextlib.nullcontext():
        return [run_case(case) for case in cases]


def run_case(case: Case) -> RankResult:
    """Train a case on this rank's place of its layout; collective over the layout's ranks."""
    config = case.config()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    stage = engine.stage
    parameters = dict(stage.decoder.named_parameters())
    initial = {name: whole(parameter) for name, parameter in parameters.items()}
    gradients: list[Held] = []
    sizes: dict[str, int] = {}
    take_model_step = engine._take_model_step

    def look_and_step(lr_kwargs: Any) -> None:
        if not gradients:
            sizes["gradients"] = _bytes(gradient_tensors(engine.optimizer, engine.stage))
        gradients.append(_held(stage.shards, {name: safe_get_full_grad(p) for name, p in parameters.items()}))
        take_model_step(lr_kwargs)

    engine._take_model_step = look_and_step  # type: ignore[method-assign]
    plans = plan_stream(config, mesh, first_step=0)
    result: dict[str, list[Any]] = {"losses": [], "norms": [], "donors": []}
    for batch in case.micro_batches():
        plan = plans.next()
        result["donors"].append(plan.donors.tolist())
        result["losses"].append(engine.train_step(iter(batch[mesh.replica :: mesh.replicas]), plan))
        result["norms"].append(engine.gradient_norm)
    plans.close()
    weights = {name: whole(parameter) for name, parameter in parameters.items()}
    masters = weights
    if case.precision == "bf16":
        masters = {name: safe_get_full_fp32_param(parameter) for name, parameter in parameters.items()}
    states = _optimizer_tensors(engine)
    sizes["parameters"] = _bytes(getattr(p, "ds_tensor", p) for p in parameters.values())
    sizes["optimizer"] = _bytes(states)
    measured = RankResult(
        stage=mesh.stage,
        **result,
        initial=_held(stage.shards, initial),
        gradients=gradients,
        weights=_held(stage.shards, weights),
        masters=_held(stage.shards, masters),
        sent_bytes=engine.sent_bytes,
        backward_passes=engine.backward_passes,
        bytes=sizes,
        expected_bytes=expected_bytes(case, mesh, sum(t.numel() for t in initial.values())),
        state_dtypes={tensor.dtype for tensor in states},
    )
    engine.destroy()
    gc.collect()
    return measured


def whole(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of a parameter, on the host, whatever ZeRO stage holds it; collective over the replicas."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu().clone()
    with GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def _held(shards: dict[str, Shard], tensors: dict[str, Tensor]) -> Held:
    return {name: (shards[name], shards[name].unpadded(tensor.cpu()).clone()) for name, tensor in tensors.items()}


def expected_bytes(case: Case, mesh: Mesh, parameters: int) -> dict[str, int]:
    """Bytes that this rank should hold, from its number of parameters (before ZeRO shares them out).

    DeepSpeed keeps fp32 master weights apart from the parameters from ZeRO-1 on, in fp32 runs too; in bf16 with ZeRO-1
    whole fp32 gradients beside the bf16 ones; and with an offloaded optimizer, in bf16 with ZeRO-1 and 2, the fp32
    gradients that the host gets a copy of.
    """
    config, bf16 = case.config(), case.precision == "bf16"
    zero, offload = config.parallel.zero_stage, config.offloads_optimizer
    shared = parameters // mesh.replicas
    adam = 8
    gradients = 4 * (shared if zero >= 1 else parameters)
    if bf16 and offload and zero < 3:
        gradients = 8 * shared
    elif bf16 and zero == 1:
        gradients = 6 * parameters
    return {
        "parameters": (2 if bf16 else 4) * (shared if zero == 3 else parameters),
        "gradients": gradients,
        "optimizer": (adam + 4) * shared if zero >= 1 else adam * parameters,
    }


def _optimizer_tensors(engine: RoutedPipelineEngine) -> list[Tensor]:
    """Moments, and the master weights where they are not the parameters themselves."""
    own = {p.data_ptr() for p in engine.stage.parameters()}
    optimizer = engine.basic_optimizer
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3
    masters = [p for p in (*groups, *partitions) if p.data_ptr() not in own]
    moments = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim() > 0]
    return [*masters, *moments]


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    spans: dict[int, int] = {}
    for tensor in tensors:
        spans[tensor.data_ptr()] = max(spans.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(spans.values())
