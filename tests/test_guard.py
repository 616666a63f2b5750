"""Updates that are not applied: exactly dropped in every optimizer, agreed on by all ranks, counted, and bounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skvr_dist.parity.cases import LAYOUTS, Case, batches
from skvr_dist.parity.ranks import run_ranks
from skvr_dist.train.config import Config

STEPS = 4
BAD_STEP = 1


def configured(layout: str, precision: str = "fp32", **train: Any) -> Config:
    """A case whose learning rate differs from step to step."""
    config = Case(layout, tied="PP" in layout, precision=precision).config()
    section = config.train.model_copy(update={"steps": STEPS, "warmup_steps": STEPS, **train})
    return config.model_copy(update={"train": section})


def everything(engine: Any) -> list[Tensor]:
    """Weights, master weights, moments and the optimizer's own counts of steps, copied."""
    from skvr_dist.parity.measure import _optimizer_tensors, whole

    counts = [state["step"] for state in engine.basic_optimizer.state.values() if "step" in state]
    weights = [whole(p) for p in engine.stage.decoder.parameters()]
    return [*weights, *(t.clone() for t in _optimizer_tensors(engine)), *(torch.as_tensor(c).clone() for c in counts)]


def break_the_bad_step(config: Config, kind: str) -> list[dict[str, Any]]:
    """Train twice: once with a step that goes wrong on the last rank, once without that step's batch."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.loop import build_engine

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
                weight = engine.stage.decoder.norm.weight
                hooks.append(weight.register_hook(lambda gradient: gradient.fill_(math.inf)))
            if step == BAD_STEP and kind == "loss" and last_rank:
                norm = engine.stage.decoder.norm
                hooks.append(norm.register_forward_hook(lambda module, inputs, output: output * math.nan))
            before = everything(engine)
            result["rates"].append(engine.get_lr()[0])
            mine = iter(batch[mesh.replica :: mesh.replicas])
            result["losses"].append(engine.train_step(mine, config.plan(step)))
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
        ("DP2 ZeRO-3", "bf16", "loss"),
        ("DP2 ZeRO-3 offload", "fp32", "gradient"),
        ("PP2", "fp32", "gradient"),
        ("PP2xDP2 ZeRO-1", "bf16", "gradient"),
        ("PP2xDP2 ZeRO-3", "fp32", "gradient"),
        ("TP2xPP2", "fp32", "loss"),
    ],
)
def test_an_update_that_is_not_finite_is_dropped_exactly(layout: str, precision: str, kind: str) -> None:
    for broken, spared in run_ranks(LAYOUTS[layout].ranks, break_the_bad_step, configured(layout, precision), kind):
        assert broken["unchanged"]
        assert broken["reason"] == ("its gradient is not finite" if kind == "gradient" else "its loss is nan")
        assert math.isnan(broken["norms"].pop(BAD_STEP)) and math.isnan(broken["losses"].pop(BAD_STEP)) == (
            kind == "loss"
        )
        del broken["rates"][BAD_STEP]
        assert (broken["skipped"], broken["steps"]) == (1, STEPS)
        # What follows is what a run gets that never had the batch.
        assert {key: broken[key] for key in ("losses", "norms", "rates")} == {
            key: spared[key] for key in ("losses", "norms", "rates")
        }
        assert len(set(broken["rates"])) == STEPS - 1
        assert all(torch.equal(a, b) for a, b in zip(broken["state"], spared["state"], strict=True))
