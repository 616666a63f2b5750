"""Compiled layers: as many graphs as there are ways of routing a layer, and the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import flash_on_cpu
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


def gradients(decoder: Decoder, donors: list[list[int]], documents: torch.Tensor | None) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(sum(map(sum, donors)))
    tokens = torch.randint(97, (2, 12), generator=generator)
    decoder.zero_grad()
    hidden, _ = decoder.run_layers(decoder.embed(tokens), donors, {}, documents=documents)
    next_token_loss(decoder.logits(hidden), tokens.roll(1, 1)).backward()
    return [parameter.grad for parameter in decoder.parameters()]


@pytest.mark.parametrize(("rows", "graphs"), [(1, 3), (2, 3)], ids=["a row", "a row for each sequence"])
def test_few_graphs_for_any_plan_and_equal_gradients(rows: int, graphs: int) -> None:
    eager, compiled = (Decoder(ModelConfig.model_validate(SHAPE)) for _ in range(2))
    for decoder in (eager, compiled):
        initialize(decoder, seed=3)
    compile_layers(compiled, "aot_eager", torch.device("cpu"))
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


@pytest.mark.parametrize(("separate", "graphs"), [(False, 3), (True, 3)], ids=["joined", "separate documents"])
def test_flash_kernels_make_no_more_graphs(separate: bool, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of a layer's graph where all is joined; left out of it where bounds change with every batch."""
    flash_on_cpu.give_to_torch(monkeypatch)
    eager, compiled = (Decoder(ModelConfig.model_validate({**SHAPE, "attention": "fa2"})) for _ in range(2))
    for decoder in (eager, compiled):
        initialize(decoder, seed=3)
    compile_layers(compiled, "aot_eager", torch.device("cpu"))
    rng, made = np.random.default_rng(0), []
    for _ in range(30 if separate else 8):
        donors = [[int(rng.integers(layer + 1)) for layer in range(LAYERS)]]
        numbers = torch.tensor(np.sort(rng.integers(0, rng.integers(1, 9), size=(2, 12)), axis=1))
        documents = numbers if separate else None
        for ours, theirs in zip(
            gradients(compiled, donors, documents), gradients(eager, donors, documents), strict=True
        ):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        made.append(counters["stats"]["unique_graphs"])
    assert made[-1] == graphs
    assert not counters["graph_break"]


def test_auto_compiles_on_gpus_only() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve_compile("auto", cpu), resolve_compile("auto", cuda)] == [None, "inductor"]
    assert [resolve_compile(name, cpu) for name in ("inductor", "aot_eager", "off")] == ["inductor", "aot_eager", None]
    assert resolve_compile("off", cuda) is None
