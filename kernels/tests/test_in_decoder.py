"""A decoder whose layers read from an arena, against the formula: outputs and gradients, however it is cut or run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ActivationCheckpointing
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import Case
from skvr_dist.model.attention_choice import _try_arena, resolve
from skvr_dist.model.decoder import KV, Decoder, initialize

MODEL = ModelConfig.model_validate(Case("single").shape)
DOCUMENTS = torch.tensor([[0] * 15 + [1] * 22, [0] * 5 + [1] * 20 + [2] * 12])
ONE, EACH = [[0, 0, 2, 1, 2]], [[0, 0, 2, 1, 2], [0, 1, 1, 0, 4]]


def outputs_and_gradients(
    attention: str, donors: list[list[int]], cuts: tuple[int, ...], documents: Tensor | None, recompute: str
) -> Iterator[Tensor]:
    """Of a decoder cut into stages before these layers."""
    config = MODEL.model_copy(update={"attention": attention})
    stages = [
        Decoder(config, start, stop, checkpointing=ActivationCheckpointing(recompute=recompute))
        for start, stop in zip((0, *cuts), (*cuts, 5), strict=True)
    ]
    for stage in stages:
        initialize(stage, seed=0)
    tokens = torch.randint(0, MODEL.vocab_size, (2, 37), generator=torch.Generator().manual_seed(1))
    hidden, known = stages[0].embed(tokens), dict[tuple[int, int], KV]()
    for stage in stages:
        hidden, known = stage.run_layers(hidden, donors, known, documents=documents)
    logits = stages[-1].logits(hidden)
    logits.square().sum().backward()
    yield logits.detach()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            yield parameter.grad


@pytest.mark.parametrize(
    ("donors", "cuts", "documents", "recompute"),
    [
        (ONE, (), None, "none"),
        (ONE, (2,), DOCUMENTS, "layer"),
        (EACH, (), DOCUMENTS, "none"),
        (EACH, (1, 4), None, "attention"),
        (EACH, (2, 3), DOCUMENTS, "layer"),
    ],
)
def test_follows_the_formula(
    donors: list[list[int]], cuts: tuple[int, ...], documents: Tensor | None, recompute: str
) -> None:
    found = outputs_and_gradients("routed", donors, cuts, documents, recompute)
    for ours, right in zip(found, outputs_and_gradients("eager", donors, cuts, documents, recompute), strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


def test_what_the_kernel_cannot_do_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match="takes even head sizes up to 128 in float32, not 130; use auto or sdpa"):
        resolve("routed", torch.device("cpu"), torch.float32, 130)


def test_the_trial_before_it_is_taken_runs() -> None:
    _try_arena(torch.device("cpu"), torch.float32, 64)


def test_a_pass_without_gradients_holds_none() -> None:
    """Of a frozen teacher they would be as large as all of its keys and values, for the whole run."""
    decoder = Decoder(MODEL.model_copy(update={"attention": "routed"}))
    initialize(decoder, seed=0)
    tokens = torch.zeros(2, 37, dtype=torch.long)
    with torch.no_grad():
        decoder.run_layers(decoder.embed(tokens), EACH, {})
    assert decoder._arena_gradients._held is None
    hidden, _ = decoder.run_layers(decoder.embed(tokens), EACH, {})
    hidden.sum().backward()
    held = decoder._arena_gradients._held
    assert held is not None and not held.any()
