"""The loss of a step is the mean over the labels of its global batch, however the batch is cut and laid out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import IGNORED, MicroBatch
from skvr_dist.evaluate.retention import retention_curve
from skvr_dist.lab.verify.cases import LAYOUTS, SEED, SHAPE, Case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.model.decoder import Decoder, initialize
from skvr_dist.routing import CacheStrategy
from skvr_dist.train.plans import plan_of_step

KEPT = (12, 1, 12, 2, 0, 12, 3, 12)
"""Labels of each sequence of the global batch; the other ones are ignored."""


def sequences(kept: tuple[int, ...] = KEPT) -> tuple[Tensor, Tensor]:
    """Tokens and labels of the global batch, int [N, S]."""
    drawn = torch.randint(0, SHAPE["vocab_size"], (len(kept), 13), generator=torch.Generator().manual_seed(1))
    tokens, labels = drawn[:, :-1].clone(), drawn[:, 1:].clone()
    for row, count in enumerate(kept):
        labels[row, count:] = IGNORED
    return tokens, labels


def configured(layout: str, micro_batch_size: int = 2, **train: Any) -> Config:
    config = Case(layout, "none").config()
    changed = {"global_batch_size": 8, "micro_batch_size": micro_batch_size, "gradient_clipping": 0.0, **train}
    return config.model_copy(update={"train": config.train.model_copy(update=changed)})


def plain_decoder() -> Decoder:
    decoder = Decoder(ModelConfig.model_validate(Case("single").shape))
    initialize(decoder, SEED)
    return decoder


def per_token(kept: tuple[int, ...]) -> tuple[float, float]:
    """Loss and gradient norm of the whole batch at once, by torch's own mean over labels."""
    tokens, labels = sequences(kept)
    decoder = plain_decoder()
    logits = decoder(tokens, range(5)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters() if p.grad is not None])
    return loss.item(), norm.item()


def train_once(layout: str, micro_batch_sizes: list[int], kept: tuple[int, ...]) -> list[dict[str, Any]]:
    """Evaluate the batch and train one step on it, cut into micro-batches of each of these sizes."""
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    results = []
    for size in micro_batch_sizes:
        config = configured(layout, size)
        mesh = Mesh.build(config.parallel, config.model)
        engine = build_engine(config, mesh)
        tokens, labels = (part.split(size) for part in sequences(kept))
        mine = [MicroBatch(*both) for both in zip(tokens, labels, strict=True)][mesh.dp_rank :: mesh.dp_size]
        engine.evaluate(mine, range(5))  # nothing of it is left in the next one
        held_out, evaluated = engine.evaluate(mine, range(5)), engine.predicted_tokens
        loss = engine.train_step(iter(mine), plan_of_step(config, 0))
        results.append(
            {
                "losses": [held_out, loss],
                "norm": engine.gradient_norm,
                "tokens": [evaluated, engine.predicted_tokens],
                "guarded": engine.guard.state()["losses"],
            }
        )
        engine.destroy()
    return results


@pytest.mark.parametrize(("layout", "sizes"), [("single", [1, 2, 4, 8]), ("DP2 ZeRO-1", [1, 2, 4]), ("PP2", [1, 4])])
def test_every_micro_batch_size_gives_the_loss_and_gradient_of_the_whole_batch(layout: str, sizes: list[int]) -> None:
    loss, norm = per_token(KEPT)
    assert (loss, norm) == pytest.approx((4.683575, 4.163782), abs=1e-6)
    for by_size in run_ranks(LAYOUTS[layout].ranks, train_once, layout, sizes, KEPT):
        for found in by_size:
            assert found["losses"] == pytest.approx([loss, loss], rel=1e-6)
            assert found["norm"] == pytest.approx(norm, rel=1e-5)
            assert found["tokens"] == [sum(KEPT)] * 2
            assert found["guarded"] == found["losses"][1:]


def test_micro_batches_that_are_lost_change_neither_loss_nor_gradient_of_the_others() -> None:
    """As with `data.damage: skip`; the replica of the second two has nothing left."""
    kept = (12, 12, 0, 0, 12, 12, 0, 0)
    loss, norm = per_token(kept)
    for (found,) in run_ranks(2, train_once, "DP2 ZeRO-1", [2], kept):
        assert found["losses"] == pytest.approx([loss, loss], rel=1e-6)
        assert found["norm"] == pytest.approx(norm, rel=1e-5)


def train_without_labels(config: Config) -> dict[str, Any]:
    """A step, a step without a label, and a step again."""
    from skvr_dist.parallel.engine.optimizers import gather_parameter
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine

    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    losses, reasons, weights = [], [], []
    for step, kept in enumerate((KEPT, (0,) * 8, KEPT)):
        tokens, labels = (part.split(2) for part in sequences(kept))
        mine = [MicroBatch(*both) for both in zip(tokens, labels, strict=True)][mesh.dp_rank :: mesh.dp_size]
        losses.append(engine.train_step(iter(mine), plan_of_step(config, step)))
        reasons.append(engine.guard.reason)
        weights.append([gather_parameter(p) for p in engine.stage.decoder.parameters()])
    nothing = [MicroBatch(tokens[0], torch.full_like(labels[0], IGNORED))]
    return {
        "losses": losses,
        "reasons": reasons,
        "unchanged": all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True)),
        "moved": all(bool((a != b).any()) for a, b in zip(weights[1], weights[2], strict=True)),
        "finite": all(bool(weight.isfinite().all()) for weight in weights[2]),
        "held_out": engine.evaluate(nothing, range(5)),
    }


@pytest.mark.parametrize("layout", ["single", "PP2xDP2 ZeRO-3"])
def test_a_step_without_a_label_updates_nothing(layout: str) -> None:
    for rank in run_ranks(LAYOUTS[layout].ranks, train_without_labels, configured(layout)):
        assert [math.isnan(loss) for loss in rank["losses"]] == [False, True, False]
        assert rank["reasons"] == [None, "none of its tokens has a label to predict", None]
        assert rank["unchanged"] and rank["moved"] and rank["finite"]
        assert math.isnan(rank["held_out"])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_retention_curve_is_a_mean_over_tokens(batch_size: int) -> None:
    tokens, labels = sequences()
    batches = [MicroBatch(*both) for both in zip(tokens.split(batch_size), labels.split(batch_size), strict=True)]
    decoder = plain_decoder()
    strategy = CacheStrategy.parse("every:2", 5)
    (point,) = retention_curve(decoder, batches, {"every:2": strategy})
    with torch.inference_mode():
        logits = decoder(tokens, strategy.kv_source_layers).flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
    assert point.loss == pytest.approx(wanted.item(), rel=1e-6)
