"""Ranks that hold the same weight hold the same bits, after any number of steps."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import SEQUENCE, SHAPE, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.train.plans import plan_of_step

REPLICAS, STEPS = 3, 4  # of three summands, unlike of two, the order shows in the last bit
TIED = "embed_tokens.weight"


def configured(pipeline: int, zero_stage: int, precision: str, persist: bool) -> Config:
    config = Case("DP2 ZeRO-1", "uniform", tied=True, precision=precision, steps=STEPS).config()
    zero = {"stage3_param_persistence_threshold": 10**6 if persist else 0}
    # Stages of different sizes, and a large embedding: a collective cuts their gradients in different places, and it
    # depends on the place in which order it adds the replicas up.
    layers = [1, 4] if pipeline == 2 else None
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": 997}),
            "parallel": config.parallel.model_copy(
                update={"pipeline": pipeline, "stage_layers": layers, "zero_stage": zero_stage}
            ),
            "train": config.train.model_copy(update={"global_batch_size": 4 * REPLICAS}),
            "data": config.data.model_copy(update={"lanes": 4 * REPLICAS}),
            "deepspeed": {"zero_optimization": zero},
        }
    )


def train(modes: list[tuple[int, str, bool]], pipeline: int) -> list[dict[str, Any]]:
    """What this rank holds of each weight after a run in each of these modes: ZeRO stage, precision, persistence."""
    from skvr_dist.parallel.engine.optimizers import gather_parameter
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    held = []
    for zero_stage, precision, persist in modes:
        config = configured(pipeline, zero_stage, precision, persist)
        mesh = Mesh.build(config.parallel, config.model)
        engine = build_engine(config, mesh)
        generator = torch.Generator().manual_seed(2)
        for step in range(STEPS):
            batch = torch.randint(0, SHAPE["vocab_size"], (2 * REPLICAS, 2, SEQUENCE + 1), generator=generator)
            engine.train_step(map(MicroBatch.of, batch[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, step))
        held.append({name: gather_parameter(p) for name, p in engine.stage.decoder.named_parameters()})
        engine.destroy()
        gc.collect()
    return held


def require_same_bits(ranks: list[dict[str, Tensor]]) -> None:
    copies: dict[str, list[Tensor]] = {}
    for held in ranks:
        for name, weight in held.items():
            copies.setdefault(name, []).append(weight)
    for name, weights in copies.items():
        assert len(weights) == (len(ranks) if name == TIED else REPLICAS)
        for weight in weights[1:]:
            assert torch.equal(weight, weights[0]), f"{name} differs in {int((weight != weights[0]).sum())} elements"


def test_both_stages_of_a_tied_weight_and_all_replicas_stay_the_same() -> None:
    modes = [(0, "fp32", False), (1, "fp32", False), (1, "bf16", False), (3, "fp32", False), (3, "fp32", True)]
    by_rank = run_ranks(2 * REPLICAS, train, modes, 2)
    for ranks in zip(*by_rank, strict=True):
        require_same_bits(list(ranks))


def test_replicas_stay_the_same_without_a_pipeline() -> None:
    modes = [(0, "fp32", False), *((stage, precision, False) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
    for ranks in zip(*run_ranks(REPLICAS, train, modes, 1), strict=True):
        require_same_bits(list(ranks))


def refusal_of_deepspeed() -> str:
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    config = configured(1, 3, "fp32", persist=True)
    quantized = {"zero_optimization": {"zero_quantized_weights": True}}
    with pytest.raises(UserError) as refused:
        build_engine(config.model_copy(update={"deepspeed": quantized}), Mesh.build(config.parallel, config.model))
    return str(refused.value)


def test_what_deepspeed_refuses_when_it_begins_is_told_with_the_options() -> None:
    """It reads them without complaint; this one has no code for CPUs."""
    (sentence,) = run_ranks(1, refusal_of_deepspeed)
    assert sentence.startswith(
        "DeepSpeed cannot train with deepspeed.zero_optimization {'zero_quantized_weights': True}"
    )
    assert "not been implemented on CPU backend" in sentence and sentence.endswith("change that, or leave it out")
