"""Donors of each sequence: micro-batches of four train as micro-batches of one with the same draws do."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import END, SEQUENCE, SHAPE, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.resume import require_same_training

SEQUENCES = 8


def configured(micro_batch_size: int, draws_per: str) -> Config:
    config = Case("PP2", documents="separate", tied=True, clip=0.0).config()
    train = {"micro_batch_size": micro_batch_size, "global_batch_size": SEQUENCES}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "routing": config.routing.model_copy(update={"draws_per": draws_per}),
        }
    )


def train_once(ways: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Loss, bytes sent and gradients of a step in each way."""
    from skvr_dist.parallel.engine.gradients import gather_gradient
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    torch.manual_seed(3)
    tokens = torch.randint(
        0, SHAPE["vocab_size"], (SEQUENCES, SEQUENCE + 1), generator=torch.Generator().manual_seed(3)
    )
    found = []
    for way in ways:
        config = configured(*way)
        mesh = Mesh.build(config.parallel, config.model)
        engine = build_engine(config, mesh)
        parameters = dict(engine.stage.decoder.named_parameters())
        gradients: dict[str, torch.Tensor] = {}
        engine.before_update = lambda parameters=parameters, gradients=gradients: gradients.update(
            {name: gather_gradient(parameter).clone() for name, parameter in parameters.items()}
        )
        batches = [MicroBatch.of(each, END) for each in tokens.split(way[0])]
        loss = engine.train_step(iter(batches), plan_of_step(config, 0))
        found.append({"loss": loss, "sent": engine.sent_bytes, "gradients": gradients})
        engine.destroy()
        gc.collect()
    return found


def test_micro_batches_of_four_train_as_micro_batches_of_one() -> None:
    """On two stages, within documents; nothing more crosses, either."""
    plan = plan_of_step(configured(4, "sequence"), 0)
    assert plan.num_micro_batches == 2
    assert all(len(set(plan.of_micro_batch(q))) > 1 for q in range(2))  # they do differ
    for rank in run_ranks(2, train_once, [(4, "sequence"), (1, "micro_batch"), (4, "micro_batch")]):
        fours, ones, shared = rank
        assert fours["loss"] == pytest.approx(ones["loss"], rel=1e-6)
        assert fours["loss"] != pytest.approx(shared["loss"], rel=1e-6)
        assert fours["sent"] == ones["sent"]
        for name, gradient in ones["gradients"].items():
            torch.testing.assert_close(fours["gradients"][name], gradient, rtol=1e-5, atol=1e-7)


def test_another_micro_batch_size_resumes_where_it_decides_nothing() -> None:
    def checkpoint_of(config: Config) -> Checkpoint:
        facts = SimpleNamespace(data_fingerprint={})
        return cast(Checkpoint, SimpleNamespace(folder="CKPT", step=1, has_moments=True, config=config, facts=facts))

    require_same_training(checkpoint_of(configured(4, "sequence")), configured(2, "sequence"), {})
    with pytest.raises(UserError, match=r"has train\.micro_batch_size 4, the configuration 2"):
        require_same_training(checkpoint_of(configured(4, "micro_batch")), configured(2, "micro_batch"), {})
    with pytest.raises(UserError, match=r"has routing\.draws_per sequence, the configuration micro_batch"):
        require_same_training(checkpoint_of(configured(4, "sequence")), configured(4, "micro_batch"), {})
