"""Between its beginning and its update a step never waits for the device; then the host reads it once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from skvr_dist.config.tree import Config
from skvr_dist.lab.verify.cases import BATCH, SEQUENCE, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.model.decoder import Decoder
from skvr_dist.model.documents import Documents
from skvr_dist.model.loss import Objective, Teacher
from skvr_dist.parallel.engine.gradients import numbers_of
from skvr_dist.parallel.engine.stage import Prediction, StageModule
from skvr_dist.parallel.pipeline.boundary import Handover, HandoverFormat, MicroBatchShape
from skvr_dist.parallel.pipeline.step_plan import PassPlan, plan_for_stage
from skvr_dist.train.plans import plan_of_step

STAGES = ((0, 2), (2, 3), (3, 5))


@pytest.mark.parametrize(
    "case",
    [
        Case("PP4 uneven"),
        Case("PP4 uneven", checkpointing="layer", tied=True, draws_per="sequence"),
        Case("PP4 uneven", checkpointing="attention", family="llama", rope_scaling=True),
        Case("PP4 uneven", documents="separate", draws_per="sequence"),
    ],
    ids=lambda case: ", ".join([case.checkpointing, *case.also]),
)
def test_no_stage_asks_for_a_number_of_a_tensor(case: Case) -> None:
    """First, middle and last one, forwards and backwards, with tensors that have no numbers."""
    config = case.config()
    documents = None
    if config.data.documents == "separate":  # worked out on the host, where tensors have numbers
        documents = Documents.of(torch.arange(SEQUENCE).div(5, rounding_mode="floor").expand(BATCH, -1), case.rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run_through_stages(config, [of_stage(config, each) for each in STAGES], documents)


def of_stage(config: Config, bounds: tuple[int, int]) -> PassPlan:
    """What a stage is told of the first micro-batch."""
    mesh = cast(Any, SimpleNamespace(pp_rank=0, pp_size=3, dp_rank=0, dp_size=1))
    return plan_for_stage(plan_of_step(config, 0), mesh, *bounds)[0]


def run_through_stages(config: Config, plans: list[PassPlan], documents: Documents | None) -> None:
    """One micro-batch over three stages and back, packed at each boundary."""
    model, checkpointing = config.model, config.parallel.activation_checkpointing
    mesh = cast(Any, SimpleNamespace(tp_size=1, tp_rank=0))
    form = HandoverFormat(model, mesh, MicroBatchShape(BATCH, SEQUENCE, False), rows=len(plans[0].donors))
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    objective = Objective(tokens, teacher=Teacher(torch.zeros(BATCH, SEQUENCE, model.hidden_size), weight=0.5))
    entered: list[Any] = []
    left: list[Any] = []
    for bounds, plan in zip(STAGES, plans, strict=True):
        inputs: Any = tokens
        if left:
            inputs = form.unpack(form.pack(left[-1].tensors()), plan.entering)
            for tensor in inputs.tensors():
                tensor.requires_grad_()
        decoder = Decoder(model, *bounds, checkpointing=checkpointing)
        entered.append(inputs)
        left.append(
            StageModule.forward(
                cast(Any, SimpleNamespace(decoder=decoder)),
                inputs=inputs,
                donors=plan.donors,
                leaving=plan.leaving,
                documents=documents,
                objective=objective if decoder.has_head else None,
            )
        )
    prediction = left.pop()
    assert isinstance(prediction, Prediction) and prediction.losses
    prediction.losses.total.backward()
    for inputs, outputs, plan in zip(reversed(entered), reversed(left), reversed(plans[:-1]), strict=False):
        assert isinstance(inputs, Handover)
        gradients = form.unpack(
            form.pack([tensor.grad for tensor in inputs.tensors() if tensor.grad is not None]), plan.leaving
        )
        torch.autograd.backward(outputs.tensors(), gradients.tensors())


def train_watched(cases: list[Case]) -> list[list[str]]:
    """What happens in the second step of each case: norms that DeepSpeed takes, reads of the losses, the decision."""
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from skvr_dist.parallel.engine import engine as engine_module
    from skvr_dist.parallel.guard import UpdateGuard
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    seen: list[str] = []

    def watch(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            seen.append(what)
            return original(*args, **kwargs)

        setattr(owner, name, noting)

    for module in (utils, bf16_optimizer):
        watch(module, "get_global_norm_of_tensors", "norm")
    watch(DeepSpeedZeroOptimizer, "scaled_global_norm", "norm")
    watch(DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups", "norm")
    watch(engine_module, "numbers_of", "read")
    watch(UpdateGuard, "admits", "decision")
    found = []
    for case in cases:
        config = case.config()
        mesh = Mesh.build(config.parallel, config.model)
        engine = build_engine(config, mesh)
        for step, batches in enumerate(case.micro_batches()[:2]):
            seen.clear()
            engine.train_step(iter(batches[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step))
        assert engine.gradient_norm > 0
        found.append(seen.copy())
        engine.destroy()
    return found


def test_loss_and_norm_are_read_together_before_the_update() -> None:
    """And DeepSpeed takes the norm of no step again."""
    layouts = {"DP2 ZeRO-2": "fp32", "DP2 ZeRO-3": "bf16", "DP2 ZeRO-1": "bf16"}
    cases = [Case(layout, precision=precision, ragged=True) for layout, precision in layouts.items()]
    once = ["norm", "read", "decision"]
    for rank in run_ranks(2, train_watched, cases):
        assert rank == [once] * len(cases)


def test_numbers_are_read_exactly_and_in_order() -> None:
    single, double = torch.tensor(0.1), torch.tensor([1e-300, 2.0], dtype=torch.float64)
    assert numbers_of([single, double, torch.tensor(3)]) == [float(single), 1e-300, 2.0, 3.0]
    assert numbers_of([]) == []
