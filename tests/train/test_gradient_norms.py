"""Gradient norms per layer: in every kind of engine those of the plain single-process reference."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from skvr_dist.lab.verify import draws, reference
from skvr_dist.lab.verify.cases import LAYOUTS, MICRO_BATCHES, SEED, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.build import build_engine
from skvr_dist.train.gradient_norms import LayerGradientNorms, place_of
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.usage import UsageWatch

Found = tuple[list[dict[str, float]], float, dict[str, float]]


def train_cases(cases: list[Case]) -> list[Found]:
    return [train(case) for case in cases]


def train(case: Case) -> Found:
    """Two steps, of which the second is measured: norms of each step, the global one, what `UsageWatch` reports."""
    config = case.config()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    norms, usage = LayerGradientNorms(engine, config, every_steps=2), UsageWatch(mesh, 100, last_step=2)
    found = []
    for step, batch in enumerate(case.micro_batches(), start=1):
        norms.begin_step(step)
        engine.train_step(iter(batch[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step - 1))
        found.append(norms.values())
        engine.stopwatch.read()
        usage.add(engine.stopwatch.parts)
        used = usage.report(step)
    norm = engine.gradient_norm
    engine.destroy()
    gc.collect()
    return found, norm, used


def by_the_reference(case: Case) -> dict[str, float]:
    """Norms of the second step's gradients, before clipping."""
    weights = draws.initial_weights(case.shape, SEED)
    adamw = reference.AdamW(weights, clip=case.clip, betas=(0.9, 0.99), eps=case.adam_eps, weight_decay=0.1,
                            lr=case.learning_rate)  # fmt: skip
    for step in range(2):
        w = {name: value.clone().requires_grad_() for name, value in adamw.weights.items()}
        plan = draws.plan(case.routing, 5, MICRO_BATCHES, seed=SEED, step=step, steps=case.steps)
        rows = zip(case.batches()[step], plan, strict=True)
        loss = torch.stack([reference.loss(w, case.shape, tokens, row) for tokens, row in rows]).mean()
        found = torch.autograd.grad(loss, list(w.values()), allow_unused=True, materialize_grads=True)
        gradients = dict(zip(w, found, strict=True))
        adamw.step(gradients)
    squares: dict[str, float] = {}
    for name, gradient in gradients.items():
        squares[place_of(name)] = squares.get(place_of(name), 0.0) + float(gradient.double().square().sum())
    return {f"gradient_norm/{place}": math.sqrt(square) for place, square in squares.items()}


def test_norms_of_layers_in_every_kind_of_engine() -> None:
    layouts = ["PP2", "TP2 SP", "DP2 ZeRO-2", "DP2 ZeRO-3"]
    cases = [Case(layout, tied=layout == "PP2", steps=2) for layout in layouts]
    for case, *ranks in zip(cases, *run_ranks(2, train_cases, cases), strict=True):
        expected = by_the_reference(case)
        assert len(expected) == (7 if case.tied else 8)
        for found, norm, used in ranks:
            assert found[0] == {}, "the first step was not to be measured"
            assert found[1] == pytest.approx(expected, rel=1e-5), case.layout
            assert math.hypot(*found[1].values()) == pytest.approx(norm, rel=1e-5)
            stages = LAYOUTS[case.layout].parallel.get("pipeline", 1)
            parts = {"load", "forward", "backward", "exchange", "reduce", "optimizer"}
            tags = {f"time/{part}_seconds" for part in parts} | {"memory/resident_gib"}
            assert set(used) == {f"{tag}/stage_{stage}" for tag in tags for stage in range(stages)}
            assert used["time/backward_seconds/stage_0"] > 0 and 0.05 < used["memory/resident_gib/stage_0"] < 50
