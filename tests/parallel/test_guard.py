"""Updates that are not applied: exactly dropped in every optimizer, agreed on by all ranks, counted, and bounded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import LAYOUTS, Case, batches
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.lab.verify.reshard import Trainer, checkpoint_of
from skvr_dist.parallel.guard import UpdateGuard
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.state import load_state

STEPS = 3
BAD_STEP = 1


def configured(layout: str, precision: str = "fp32", **train: Any) -> Config:
    """A case whose learning rate differs from step to step."""
    config = Case(layout, tied="PP" in layout, precision=precision).config()
    section = config.train.model_copy(update={"steps": STEPS, "warmup_steps": STEPS, **train})
    return config.model_copy(update={"train": section})


def everything(engine: Any) -> list[Tensor]:
    """Weights, master weights, moments and the optimizer's own counts of steps, copied."""
    from skvr_dist.parallel.engine.optimizers import gather_parameter, optimizer_tensors

    counts = [state["step"] for state in engine.basic_optimizer.state.values() if "step" in state]
    weights = [gather_parameter(p) for p in engine.stage.decoder.parameters()]
    return [*weights, *(t.clone() for t in optimizer_tensors(engine)), *(torch.as_tensor(c).clone() for c in counts)]


def break_the_bad_step(config: Config, kind: str) -> list[dict[str, Any]]:
    """Train twice: once with a step that goes wrong on the last rank, once without that step's batch."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    mesh = Mesh.build(config.parallel, config.model)
    last_rank = mesh.rank == mesh.world_size - 1
    results = []
    for goes_wrong in (True, False):
        engine = build_engine(config, mesh)
        result: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
        for step, batch in enumerate(batches(STEPS)):
            if step == BAD_STEP and not goes_wrong:
                engine.lr_scheduler.step()
                continue
            hooks = []
            if step == BAD_STEP and kind == "gradient" and last_rank:
                weight = engine.stage.decoder.get_parameter("norm.weight")
                hooks.append(weight.register_hook(lambda gradient: gradient.fill_(math.inf)))
            if step == BAD_STEP and kind == "loss" and last_rank:
                norm = engine.stage.decoder.norm
                hooks.append(norm.register_forward_hook(lambda module, inputs, output: output * math.nan))
            before = everything(engine)
            result["rates"].append(engine.get_lr()[0])
            mine = map(MicroBatch.of, batch[mesh.dp_rank :: mesh.dp_size])
            result["losses"].append(engine.train_step(mine, plan_of_step(config, step)))
            result["norms"].append(engine.gradient_norm)
            for hook in hooks:
                hook.remove()
            if step == BAD_STEP:
                pairs = list(zip(before, everything(engine), strict=True))
                result["unchanged"] = len(pairs) > 0 and all(torch.equal(a, b) for a, b in pairs)
                result["reason"] = engine.guard.reason
        result |= {"skipped": engine.guard.skipped_steps, "steps": engine.global_steps, "state": everything(engine)}
        results.append(result)
        engine.destroy()
    return results


@pytest.mark.parametrize(
    ("layout", "precision", "kind"),
    [
        ("single", "fp32", "loss"),
        ("DP2 ZeRO-1", "fp32", "gradient"),
        ("DP2 ZeRO-2", "bf16", "gradient"),
        ("DP2 ZeRO-2 offload", "bf16", "gradient"),
        ("DP2 ZeRO-3 offload", "fp32", "gradient"),
        ("PP2", "fp32", "gradient"),
        ("PP2xDP2 ZeRO-1", "bf16", "gradient"),
        ("PP2xDP2 ZeRO-3", "fp32", "gradient"),
    ],
)
def test_an_update_that_is_not_finite_is_dropped_exactly(layout: str, precision: str, kind: str) -> None:
    for broken, spared in run_ranks(LAYOUTS[layout].ranks, break_the_bad_step, configured(layout, precision), kind):
        assert broken["unchanged"]
        assert broken["reason"] == ("its gradient is not finite" if kind == "gradient" else "its loss is nan")
        assert math.isnan(broken["norms"].pop(BAD_STEP))
        assert math.isnan(broken["losses"].pop(BAD_STEP)) == (kind == "loss")
        del broken["rates"][BAD_STEP]
        assert (broken["skipped"], broken["steps"]) == (1, STEPS)
        # What follows is what a run gets that never had the batch.
        assert {key: broken[key] for key in ("losses", "norms", "rates")} == {
            key: spared[key] for key in ("losses", "norms", "rates")
        }
        assert len(set(broken["rates"])) == STEPS - 1
        assert all(torch.equal(a, b) for a, b in zip(broken["state"], spared["state"], strict=True))


def spike(config: Config) -> dict[str, Any]:
    """Four steps, the third with logits blown up; the guard's state goes through JSON before it."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    losses, reasons = [], []
    for step, batch in enumerate(batches(4)):
        hook = engine.stage.decoder.norm.register_forward_hook(lambda module, inputs, output: output * 50)
        if step != 2:
            hook.remove()
        if step == 2:
            stored = json.dumps(engine.guard.state())
            engine.guard = UpdateGuard(max_loss_ratio=config.train.max_loss_ratio, max_skipped_in_a_row=3)
            engine.guard.load_state(json.loads(stored))
        losses.append(
            engine.train_step(map(MicroBatch.of, batch[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step))
        )
        reasons.append(engine.guard.reason)
        hook.remove()
    return {"losses": losses, "reasons": reasons, "state": engine.guard.state()}


def test_a_spike_is_skipped_where_that_is_asked_for() -> None:
    guarded = run_ranks(1, spike, configured("single", max_loss_ratio=1.5))[0]
    median = sum(guarded["losses"][:2]) / 2
    assert guarded["reasons"][:2] == [None, None] and guarded["reasons"][3] is None
    assert guarded["reasons"][2] == (
        f"its loss {guarded['losses'][2]:.4f} is above train.max_loss_ratio 1.5 times the median {median:.4f} of the "
        f"last 2"
    )
    assert guarded["state"]["losses"] == pytest.approx(guarded["losses"], rel=1e-6)
    assert (guarded["state"]["skipped_steps"], guarded["state"]["skipped_in_a_row"]) == (1, 0)
    off = run_ranks(1, spike, configured("single"))[0]
    assert off["reasons"] == [None] * 4


def go_on_from_no_update(layouts: tuple[str, str], folder: str) -> list[float]:
    """Save before any update was applied, as after steps that were all skipped, and train on from there."""
    losses: list[float] = []
    for layout, steps in zip(layouts, (range(0), range(STEPS)), strict=True):
        trainer = Trainer(Case(layout, tied=True), folder)
        if not losses and steps:
            checkpoint = Checkpoint(checkpoint_of(folder, 0))
            assert checkpoint.has_moments
            load_state(trainer.engine, checkpoint)
        losses += trainer.train(steps)
        trainer.save(len(steps))
    return losses


@pytest.mark.parametrize("layouts", [("DP2 ZeRO-0", "DP2 ZeRO-3"), ("DP2 ZeRO-1", "PP2")])
def test_a_run_resumes_before_its_first_update(layouts: tuple[str, str], tmp_path: Path) -> None:
    wanted = run_ranks(1, go_on_from_no_update, ("single", "single"), str(tmp_path / "one"))[0]
    for found in run_ranks(2, go_on_from_no_update, layouts, str(tmp_path / "two")):
        assert found == pytest.approx(wanted, rel=1e-6)


def test_a_run_of_refused_updates_ends() -> None:
    guard = UpdateGuard(max_loss_ratio=None, max_skipped_in_a_row=2)
    fine, overflow = 3.0, 3 * 1.8e19**2  # finite, but not in fp32
    reasons = []
    for step, (square, tokens) in enumerate([(overflow, 9), (fine, 9), (overflow, 9), (fine, 0)], start=1):
        guard.admits(1.0 if tokens else math.nan, square, tokens)
        reasons.append(guard.reason)
        if step < 4:
            guard.require_progress(step)
    not_finite, nothing = "its gradient is not finite", "none of its tokens has a label to predict"
    assert reasons == [not_finite, None, not_finite, nothing]
    with pytest.raises(UserError) as caught:
        guard.require_progress(4)
    message, state = str(caught.value), guard.state()
    assert message.startswith("step 4 was the 2. step in a row whose update was skipped")
    assert f"because {nothing}, and train.max_skipped_steps_in_a_row is 2" in message
    assert "lower train.learning_rate" in message
    assert state["skipped_steps"] == 3 and state["losses"] == [1.0] * 3


@given(losses=st.lists(st.floats(0.1, 100.0), max_size=50), extra=st.integers(0, 5))
def test_the_guards_state_survives_json(losses: list[float], extra: int) -> None:
    guard = UpdateGuard(max_loss_ratio=2.0, max_skipped_in_a_row=3)
    state = {"losses": losses[-32:], "skipped_steps": extra, "skipped_in_a_row": extra}
    guard.load_state(json.loads(json.dumps(state)))
    assert guard.state() == state
