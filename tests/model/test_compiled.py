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


def gradients(decoder: Decoder, donors: list[list[int]], documents: torch.Tensor) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(sum(map(sum, donors)))
    tokens = torch.randint(97, documents.shape, generator=generator)
    decoder.zero_grad()
    hidden, _ = decoder.run_layers(decoder.embed(tokens), donors, {}, documents=documents)
    next_token_loss(decoder.logits(hidden), tokens.roll(1, 1)).backward()
    return [parameter.grad for parameter in decoder.parameters()]


@pytest.mark.parametrize(("rows", "graphs"), [(1, 3), (2, 4)], ids=["a row", "a row for each sequence"])
def test_few_graphs_for_any_plan_and_equal_gradients(rows: int, graphs: int) -> None:
    eager, compiled = (Decoder(ModelConfig.model_validate(SHAPE)) for _ in range(2))
    for decoder in (eager, compiled):
        initialize(decoder, seed=3)
    compile_layers(compiled, "aot_eager")
    rng = np.random.default_rng(0)
    for _ in range(50):
        donors = [[int(rng.integers(layer + 1)) for layer in range(LAYERS)] for _ in range(rows)]
        documents = torch.tensor(np.sort(rng.integers(0, 3, size=(2, 12)), axis=1))
        for ours, theirs in zip(
            gradients(compiled, donors, documents), gradients(eager, donors, documents), strict=True
        ):
            assert ours is not None and theirs is not None
            if rows == 1:
                assert torch.equal(ours, theirs)
            else:  # in parts, the gradients of a layer's input are added in another order
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_auto_compiles_on_gpus_only() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_compile("auto", cpu), resolve_compile("auto", cuda)] == [None, "inductor"]
    assert [resolve_compile(name, cpu) for name in ("inductor", "aot_eager", "off")] == ["inductor", "aot_eager", None]
    assert resolve_compile("off", cuda) is None
