"""Separate documents: packed together they are what each is alone, for every backend and over pipeline stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import flash_on_cpu

from skvr_dist.config.model import ModelConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.lab.verify.cases import LAYOUTS, SEED, SEQUENCE, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.model.attention import BACKENDS
from skvr_dist.model.decoder import Decoder, initialize, next_token_loss
from skvr_dist.model.documents import Documents
from skvr_dist.model.modules import count_labels
from skvr_dist.parallel.engine.gradients import gather_gradient
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.routing import fixed_plan
from skvr_dist.train.build import build_engine

SHAPE = Case("single").shape
DONORS = [0, 0, 1, 1, 4]
END = 5


def micro_batches(count: int) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 20, (count, 2, SEQUENCE + 1), generator=generator)  # an END every 20 tokens or so
    tokens[:, 0, 4] = tokens[:, 0, 5] = END
    return [MicroBatch.of(batch, separate_at=END) for batch in tokens]


def test_positions_begin_anew_with_each_document() -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    together, apart = Documents.of(numbers), Documents.of(numbers, rows=2)
    assert together.positions.tolist() == apart.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert [row.tolist() for row in together.bounds] == [[0, 3, 4, 6, 7, 12]] and together.longest == (5,)
    assert [row.tolist() for row in apart.bounds] == [[0, 3, 4, 6], [0, 1, 6]] and apart.longest == (3, 5)
    assert all(row.dtype == torch.int32 for row in together.bounds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_are_what_each_is_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash_on_cpu.give_to_torch(monkeypatch)
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


def losses_and_gradients(layout: str, attention: str, checkpointing: str, compiled: str) -> dict[str, Any]:
    if attention == "fa2":
        flash_on_cpu.give_to_torch(pytest.MonkeyPatch())  # this process is of this test alone
    config = Case(layout, "none", checkpointing, compile=compiled).config()
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"attention": attention}),
            "data": config.data.model_copy(update={"documents": "separate"}),
        }
    )
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    gradients = {}

    def record() -> None:
        for name, parameter in engine.stage.decoder.named_parameters():
            shard = engine.stage.shards[name]
            gradients[name] = shard, shard.unpadded(gather_gradient(parameter)).clone()

    engine.before_update = record
    mine = micro_batches(4)[mesh.dp_rank :: mesh.dp_size]
    held_out = engine.evaluate(mine, DONORS)
    loss = engine.train_step(iter(mine), fixed_plan(tuple(DONORS), 4))
    return {"losses": [held_out, loss], "gradients": gradients}


@pytest.mark.parametrize(
    ("layout", "attention", "checkpointing", "compiled"),
    [
        ("single", "sdpa", "none", "off"),
        ("PP4 uneven", "fa2", "none", "off"),
        ("TP2 SP", "fa2", "attention", "off"),
        ("TP2 SP", "sdpa", "none", "aot_eager"),
    ],
)
def test_every_layout_trains_on_separate_documents(
    layout: str, attention: str, checkpointing: str, compiled: str
) -> None:
    """Against a plain decoder; with four stages those in the middle read documents too."""
    results = run_ranks(LAYOUTS[layout].ranks, losses_and_gradients, layout, attention, checkpointing, compiled)
    decoder = Decoder(ModelConfig.model_validate(SHAPE))
    initialize(decoder, SEED)
    batches = micro_batches(4)
    logits = torch.cat([decoder(batch.tokens, DONORS, documents=batch.documents) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert len({int(count_labels(batch.labels)) for batch in batches}) > 1, "all micro-batches have as many labels"
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    for result in results:
        assert result["losses"] == pytest.approx([loss.item()] * 2, rel=1e-6)
        for name, (shard, gradient) in result["gradients"].items():
            whole = decoder.get_parameter(name).grad
            assert whole is not None
            wanted = shard.cut(whole)
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm() + 1e-12, name
