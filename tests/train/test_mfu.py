"""Operations of a step and its MFU, against counts made by hand and by PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.lab.verify.cases import BATCH, MICRO_BATCHES, SEQUENCE, SHAPE, Case
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.model.loss import Objective
from skvr_dist.parallel.pipeline.passes import ONCE
from skvr_dist.routing import RoutingPlan, fixed_plan
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.batches import pairs_within
from skvr_dist.train.metrics import Reporter
from skvr_dist.train.mfu import StepOperations, UtilisationMeter, peak_tflops
from skvr_dist.train.passes import passes_of_step

TOKENS = BATCH * SEQUENCE
# Of SHAPE: D 32, H x E 32, K x E 16, I 48, V 97, and 5 layers. Forwards, 2 operations a multiply-add.
LAYER = 2 * TOKENS * (32 * 32 + 32 * 32 + 3 * 32 * 48)  # q, o, and the three of the MLP
KV = 2 * TOKENS * 2 * 32 * 16
SCORES = 2 * 2 * TOKENS * SEQUENCE * 32  # q k^T and p v, every position with every other
HEAD = 2 * TOKENS * 32 * 97
ALL_READ_LAYER_0 = (0, 0, 0, 0, 0)


def with_keys(config: Config, **train: object) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update=train)})


def test_the_count_by_hand() -> None:
    count, once = StepOperations(Case("single").config()), [ONCE] * MICRO_BATCHES
    own = fixed_plan((0, 1, 2, 3, 4), MICRO_BATCHES)
    causal, full = count.of_step(own, once)
    assert full == 3 * MICRO_BATCHES * (5 * (LAYER + KV + SCORES) + HEAD)
    assert full - causal == 3 * MICRO_BATCHES * 5 * SCORES / 2
    shared = fixed_plan(ALL_READ_LAYER_0, MICRO_BATCHES)
    assert full - count.of_step(shared, once)[1] == pytest.approx(3 * MICRO_BATCHES * 4 * KV)  # nobody reads four
    # Two rows of a micro-batch: a layer's keys and values are computed for all of it if one row reads them.
    rows = RoutingPlan(np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 1]] * MICRO_BATCHES), rows_per_micro_batch=2)
    assert full - count.of_step(rows, once)[1] == pytest.approx(3 * MICRO_BATCHES * 3 * KV)
    assert full - count.of_step(own, once, document_share=0.25)[1] == 3 * MICRO_BATCHES * 5 * SCORES * 0.75


def test_frozen_weights_and_passes_that_run_forwards_only_cost_less() -> None:
    plan = fixed_plan((0, 1, 2, 3, 4), MICRO_BATCHES)
    everything = StepOperations(Case("single").config()).of_step(plan, [ONCE] * MICRO_BATCHES)[1]
    only = StepOperations(with_keys(Case("single").config(), only=["k_proj", "mlp"]))
    not_trained = 5 * 2 * TOKENS * (2 * 32 * 32 + 32 * 16) + HEAD  # q, o, v
    assert everything - only.of_step(plan, [ONCE] * MICRO_BATCHES)[1] == MICRO_BATCHES * not_trained

    config = Case("single", distillation="forwards only").config()  # half: target, routed, prefix:1
    found = StepOperations(config).of_step(plan, passes_of_step(config, 0))[1]
    one = everything / MICRO_BATCHES
    assert found == 2 * one + 2 * (one / 3 + one + one - 3 * 4 * KV)
    teacher = ModelConfig.model_validate(SHAPE | {"num_hidden_layers": 1})
    assert StepOperations(config, teacher).of_step(plan, passes_of_step(config, 0))[1] == found  # it has no such pass


def test_the_count_against_pytorch() -> None:
    """PyTorch counts the operations of a decoder that runs, both ways; its count of attention is the full one."""
    model = ModelConfig.model_validate(SHAPE | {"attention": "eager"})
    decoder = Decoder(model, 0, 5)
    initialize(decoder, 0)
    tokens = torch.randint(97, (BATCH, SEQUENCE))
    donors = (0, 0, 2, 0, 2)
    with FlopCounterMode(display=False) as counter:
        hidden, _ = decoder.run_layers(decoder.embed(tokens), [donors], {})
        decoder.head(decoder.final(hidden), objective=Objective(tokens)).total.backward()
    _, full = StepOperations(Case("single").config()).of_step(fixed_plan(donors, MICRO_BATCHES), [ONCE] * MICRO_BATCHES)
    assert counter.get_total_flops() == full / MICRO_BATCHES


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(device: str, peak: float | None) -> None:
    assert peak_tflops(device, "bf16") == peak
    assert peak_tflops(device, "fp32") is None


class FakeMesh:
    """Two ranks, each with a GPU of which the ranks together have `peak`."""

    def __init__(self, peaks: list[float]) -> None:
        self.world_size, self.peaks = len(peaks), peaks
        self.devices, self.host_group = self, self
        self.device_type = "cuda"

    def sum(self, _: list[float]) -> list[float]:
        return [sum(self.peaks)]


@pytest.mark.parametrize(("peaks", "known"), [([989.0, 989.0], True), ([989.0, math.nan], False)])
def test_mfu_of_a_step(peaks: list[float], known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    meter = UtilisationMeter(Case("single").config(), FakeMesh(peaks))  # type: ignore[arg-type]
    plan = fixed_plan((0, 1, 2, 3, 4), MICRO_BATCHES)
    causal = 3 * MICRO_BATCHES * (5 * (LAYER + KV + SCORES / 2) + HEAD)
    values = meter.values(1, plan, 0.5, 0.0)
    assert values["train/model_tflops_per_rank"] == pytest.approx(causal / 0.5 / 2 / 1e12)
    if known:
        assert values["train/mfu"] == pytest.approx(causal / 0.5 / (2 * 989e12))
        assert values["train/mfu_full_attention"] > values["train/mfu"]
        separate = meter.values(1, plan, 0.5, document_pairs=MICRO_BATCHES * BATCH * SEQUENCE**2 / 2)
        assert separate["train/mfu"] < values["train/mfu"]
    else:
        assert math.isnan(values["train/mfu"]) and math.isnan(values["train/mfu_full_attention"])


def test_pairs_within_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3], [0, 0, 0, 0]])
    assert pairs_within(documents) == (9 + 1) + 4 + 16


@pytest.mark.parametrize(("mfu", "shown"), [(0.4123, "MFU 41.2%"), (math.nan, "MFU n/a"), (None, None)])
def test_the_console_shows_it_on_gpus(
    tmp_path: Path, mfu: float | None, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Reporter(0, RunFolder(tmp_path), first_step=0, steps=1, console_lost=lambda: None)
    said: list[str] = []
    monkeypatch.setattr(reporter, "say", said.append)
    others = ("loss", "predicted_tokens", "learning_rate", "gradient_norm", "tokens_per_second")
    values = {f"train/{name}": 1.0 for name in others} | ({} if mfu is None else {"train/mfu": mfu})
    values |= {"routing/cross_layer_share": 0.5, "routing/skipped_kv_share": 0.25}
    reporter.step(1, values, show=True)
    reporter.close()
    assert [word in said[0] for word in ("MFU", shown or "MFU")] == [mfu is not None] * 2
