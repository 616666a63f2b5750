"""Compiled layers: as many graphs as there are ways of routing a layer, and the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from skvr_dist.config.model import ModelConfig
from skvr_dist.lab.verify.cases import SHAPE
from skvr_dist.model.compiled import compile_layers, resolve_compile
from skvr_dist.model.decoder import Decoder, initialize, next_token_loss

LAYERS = SHAPE["num_hidden_layers"]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def gradients(decoder: Decoder, donors: list[int], documents: torch.Tensor) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(sum(donors))
    tokens = torch.randint(97, documents.shape, generator=generator)
    decoder.zero_grad()
    next_token_loss(decoder(tokens, donors, documents=documents), tokens.roll(1, 1)).backward()
    return [parameter.grad for parameter in decoder.parameters()]


def test_three_graphs_for_any_plan_and_equal_gradients() -> None:
    eager, compiled = (Decoder(ModelConfig.model_validate(SHAPE)) for _ in range(2))
    for decoder in (eager, compiled):
        initialize(decoder, seed=3)
    compile_layers(compiled, "aot_eager")
    rng = np.random.default_rng(0)
    for _ in range(50):
        donors = [int(rng.integers(layer + 1)) for layer in range(LAYERS)]
        documents = torch.tensor(np.sort(rng.integers(0, 3, size=(2, 12)), axis=1))
        for ours, theirs in zip(
            gradients(compiled, donors, documents), gradients(eager, donors, documents), strict=True
        ):
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]


def test_auto_compiles_on_gpus_only() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_compile("auto", cpu), resolve_compile("auto", cuda)] == [None, "inductor"]
    assert [resolve_compile(name, cpu) for name in ("inductor", "aot_eager", "off")] == ["inductor", "aot_eager", None]
    assert resolve_compile("off", cuda) is None
