"""Separate documents: packed together they are what each is alone, for every backend and over pipeline stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_parity import config_of

from skvr_dist.data.batch import MicroBatch
from skvr_dist.model.attention import Documents
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder, initialize, next_token_loss

SHAPE: dict[str, Any] = {
    "architecture": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
DONORS = [0, 0, 1, 1, 4]
END, SEQUENCE = 5, 12  # of `test_parity`


def micro_batches(count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (count, 2, SEQUENCE + 1), generator=generator)  # an END every 20 tokens or so
    tokens[:, 0, 4] = tokens[:, 0, 5] = END
    return [MicroBatch.of(batch, separate_at=END) for batch in tokens]


def test_positions_begin_anew_with_each_document() -> None:
    documents = Documents(torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]]))
    assert documents.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    bounds, longest = documents.flash_bounds
    assert bounds.tolist() == [0, 3, 4, 6, 7, 12] and longest == 5


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_packed_documents_are_what_each_is_alone(backend: str) -> None:
    decoder = Decoder(ModelConfig.model_validate({**SHAPE, "attention": backend}))
    initialize(decoder, seed=3)
    (batch,) = micro_batches(1)
    assert batch.documents is not None and int(batch.documents.max()) >= 2
    packed = decoder(batch.tokens, DONORS, documents=batch.documents)
    for row, numbers in enumerate(batch.documents):
        for number in numbers.unique():
            mine = numbers == number
            alone = decoder(batch.tokens[row, mine][None], DONORS)
            torch.testing.assert_close(packed[row, mine][None], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(packed, decoder(batch.tokens, DONORS), atol=1e-3)


def test_labels_that_are_ignored_cost_nothing() -> None:
    logits, labels = torch.randn(2, 4, 97), torch.randint(0, 97, (2, 4))
    labels[0, 1] = labels[1, 2] = -100
    kept = labels != -100
    wanted = torch.nn.functional.cross_entropy(logits[kept], labels[kept])
    torch.testing.assert_close(next_token_loss(logits, labels), wanted)
    assert next_token_loss(logits, torch.full_like(labels, -100)) == 0


def losses_and_gradients(stages: int) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.routing import fixed_plan
    from skvr_dist.train.loop import build_engine

    config = config_of(SHAPE, "none", {"pipeline": stages, "zero_stage": 0})
    config = config.model_copy(update={"data": config.data.model_copy(update={"documents": "separate"})})
    engine = build_engine(config, Mesh.build(stages))
    step, gradients = engine._take_model_step, {}

    def record(lr_kwargs: Any) -> None:
        gradients.update({n: safe_get_full_grad(p).clone() for n, p in engine.stage.decoder.named_parameters()})
        step(lr_kwargs)

    engine._take_model_step = record
    held_out = engine.evaluate(micro_batches(4), DONORS)
    loss = engine.train_step(iter(micro_batches(4)), fixed_plan(tuple(DONORS), 4))
    return {"losses": [held_out, loss], "gradients": gradients}


@pytest.mark.parametrize("stages", [1, 3])
def test_stages_train_on_separate_documents(stages: int) -> None:
    """Against a plain decoder; with three stages the middle one reads documents too."""
    results = run_ranks(stages, losses_and_gradients, stages)
    decoder = Decoder(ModelConfig.model_validate(SHAPE))
    initialize(decoder, seed=7)
    losses: list[torch.Tensor] = []
    for batch in micro_batches(4):
        losses.append(next_token_loss(decoder(batch.tokens, DONORS, documents=batch.documents), batch.labels))
    loss = torch.stack(losses).mean()
    loss.backward()
    for result in results:
        assert result["losses"] == pytest.approx([loss.item()] * 2, rel=1e-6)
        for name, gradient in result["gradients"].items():
            wanted = decoder.get_parameter(name).grad
            assert wanted is not None
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name
