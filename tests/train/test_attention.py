"""What a run says of its attention: a warning where it costs much more than a flash kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skvr_dist.config.tree import Config
from skvr_dist.lab.verify.cases import BF16, Case
from skvr_dist.model import attention_choice
from skvr_dist.model.attention_choice import Choice
from skvr_dist.routing import RoutingConfig
from skvr_dist.train.attention import attention_notices

CUDA = torch.device("cuda", 0)


def config(sequence: int = 2048, precision: str = "bf16", documents: str = "separate", **model: Any) -> Config:
    """One micro-batch is 2 x `sequence` tokens, with 4 query heads and 2 key/value heads of 8."""
    whole = Case("DP2 ZeRO-1", **(BF16 if precision == "bf16" else {})).config()
    return whole.model_copy(
        update={
            "model": whole.model.model_copy(update={"attention": "auto", **model}),
            "data": whole.data.model_copy(update={"sequence_length": sequence, "documents": documents}),
        }
    )


@pytest.mark.parametrize(
    ("of", "costs", "way_out"),
    [
        (
            config(attention="sdpa"),
            "a mask of 2,048 x 2,048",
            "set model.attention to auto, which takes a flash kernel",
        ),
        (config(precision="fp32"), "a mask of 2,048 x 2,048", "set train.precision to bf16, which"),
        (config(precision="fp32", attention="sdpa"), "mask", "set train.precision to bf16 and model.attention to auto"),
        (config(head_dim=320), "a mask of 2,048 x 2,048", "no flash kernel takes model.head_dim 320"),
        (config(head_dim=100), "math path", "no flash kernel takes model.head_dim 100"),
        (config(), "a mask of 2,048 x 2,048", "no flash kernel can be had: so it is"),
        (config(attention="sdpa", documents="joined"), None, ""),
        (config(precision="fp32", documents="joined"), None, ""),
        (config(attention="sdpa", sequence=1023), None, ""),
    ],
)
def test_slow_attention_on_a_gpu_is_not_passed_over_in_silence(of: Config, costs: str | None, way_out: str) -> None:
    choice = Choice("sdpa", "so it is")
    assert attention_notices(of, choice, torch.device("cpu")) == ["attention: sdpa (so it is)"]
    first, *warnings = attention_notices(of, choice, CUDA)
    assert first == "attention: sdpa (so it is)" and len(warnings) == (costs is not None)
    for warning in warnings:
        assert warning.startswith("WARNING: attention takes ") and costs is not None
        assert costs in warning and way_out in warning
    assert len(attention_notices(of, Choice("fa2", ""), CUDA)) == 1


def test_our_kernel_is_named_where_short_sequences_have_donors_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "_arena_obstacle", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    attention_choice.takes_arena.cache_clear()
    each = {"routing": RoutingConfig(policy="uniform", cross_layer_prob=0.5, draws_per="sequence")}
    fa2 = Choice("fa2", "so it is")
    for sequence, line in {
        1024: "attention: routed (sequences of 1,024 tokens have donors each); where they share donors fa2 (so it is)",
        1025: "attention: fa2 (so it is)",
    }.items():
        assert attention_notices(config(sequence).model_copy(update=each), fa2, CUDA) == [line]
    attention_choice.takes_arena.cache_clear()
    monkeypatch.setattr(attention_choice, "_arena_obstacle", lambda *_: attention_choice._Obstacle("it is not there"))
    (line,) = attention_notices(config(1024).model_copy(update=each), fa2, CUDA)
    assert line == ("attention: fa2 (so it is; not routed, made for short sequences with donors each: it is not there)")
    attention_choice.takes_arena.cache_clear()


def test_the_cost_of_scores_is_named() -> None:
    _, warning = attention_notices(config(head_dim=100), Choice("sdpa", ""), CUDA)
    assert "2 x 4 heads x 2,048 x 2,048, 64 MiB for each of several copies" in warning
    _, warning = attention_notices(config(1024, documents="joined"), Choice("eager", ""), CUDA)
    assert "takes the formula, which keeps all scores: 2 x 4 heads x 1,024 x 1,024, 32 MiB for each" in warning
    assert warning.endswith("set model.attention to auto")
    assert len(attention_notices(config(1023), Choice("eager", ""), CUDA)) == 1
