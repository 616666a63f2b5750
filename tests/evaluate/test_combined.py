"""Retention with quantized caches and sliding windows: the loss of decoding token by token, and the bytes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.datasets import write_dataset
from support.hf_models import published, random_weights, routed_model, shape_of
from torch import Tensor
from transformers import QuantizedCache

from skvr_dist.commands import retention
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.evaluate.combined import Form, combined_curve, token_losses
from skvr_dist.model.modules import token_cross_entropy
from skvr_dist.routing import CacheStrategy

SHAPE = shape_of("qwen3", num_hidden_layers=4)
RECENT, LENGTH = 8, 32
SOME = CacheStrategy(4, (0, 2))


@cache
def model() -> Any:
    return routed_model(SHAPE, random_weights(SHAPE, 0.2))


@cache
def batch() -> MicroBatch:
    tokens = torch.randint(101, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return MicroBatch.of(tokens)


def losses_of(form: Form) -> Tensor:
    model().set_cache_strategy(list(SOME.retained))
    return token_losses(model(), [batch()], form, RECENT)[0]


@torch.inference_mode()
def test_a_quantized_cache_costs_what_decoding_token_by_token_costs() -> None:
    """With transformers' own cache and its own masks: a prompt of eight tokens, then one at a time."""
    model().set_cache_strategy(list(SOME.retained))
    settings: dict[str, Any] = {"nbits": 4, "axis_key": 1, "axis_value": 1, "q_group_size": 8}
    cached = QuantizedCache("hqq", model().config, residual_length=RECENT, **settings)
    parts = [slice(0, RECENT), *(slice(at, at + 1) for at in range(RECENT, LENGTH))]
    logits = [model()(batch().tokens[:, part], past_key_values=cached, use_cache=True).logits for part in parts]
    expected = token_cross_entropy(torch.cat(logits, dim=1), batch().labels).view(2, LENGTH)
    found = losses_of(Form(4, None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    in_full = losses_of(Form(16, None))
    torch.testing.assert_close(found[:, :RECENT], in_full[:, :RECENT])
    assert (found[:, RECENT:] - in_full[:, RECENT:]).abs().mean() > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("window", [5, 12])
def test_a_window_costs_what_a_mask_over_the_whole_text_costs(window: int) -> None:
    model().set_cache_strategy(list(SOME.retained))
    places = torch.arange(LENGTH)
    back = places[:, None] - places
    mask = ((back >= 0) & (back < window))[None, None]
    logits = model()(batch().tokens, attention_mask=mask, use_cache=False).logits
    expected = token_cross_entropy(logits, batch().labels).view(2, LENGTH)
    torch.testing.assert_close(losses_of(Form(16, window)), expected, rtol=1e-4, atol=1e-4)


def test_documents_stay_apart_in_a_cache() -> None:
    """The second half of a sequence, as a document of its own, is read as if nothing came before it."""
    half = LENGTH // 2
    documents = (torch.arange(LENGTH) >= half).long().expand(2, -1)
    apart = batch()._replace(documents=documents)
    alone = MicroBatch(batch().tokens[:, half:], batch().labels[:, half:])
    model().set_cache_strategy(list(SOME.retained))
    found = token_losses(model(), [apart], Form(16, None), RECENT)[0][:, half:]
    torch.testing.assert_close(found, token_losses(model(), [alone], Form(16, None), RECENT)[0], rtol=1e-4, atol=1e-4)


def test_bytes_are_those_that_are_counted_and_scales_with_zero_points() -> None:
    strategies = {"full": CacheStrategy.full(4), "some": SOME}
    points = combined_curve(model(), [batch()], strategies, bits=[16, 8, 4], windows=[None, 16], recent=RECENT)
    found = {(p.strategy, p.bits, p.window): (p.counted_bytes, p.held_bytes) for p in points}
    per_layer = 2 * SHAPE.num_key_value_heads * SHAPE.head_dim  # elements of a token
    for name, layers in (("full", 4), ("some", 2)):
        for window, share in ((None, 1), (16, 0.5)):
            elements = layers * per_layer * share
            assert found[name, 16, window] == (2 * elements, 2 * elements)
            # Every eight elements, a head of this model, have a scale and a zero point of two bytes each.
            assert found[name, 8, window] == (elements, elements * 12 / 8)
            assert found[name, 4, window] == (elements / 2, elements * 8 / 8)
    assert points[0].rise == (0, 0, 0) and all(point.rise.mean != 0 for point in points[1:])


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(shape_of("qwen3", num_hidden_layers=4, vocab_size=500), tmp_path / "model")
    write_dataset(tmp_path / "data", [[list(range(1, 91))]])
    words = [str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--sequence-length", "16", "--sequences", "2"]
    words += ["--batch-size", "2", "--strategies", "every:2", "--bits", "4", "--windows", "8", "--recent", "4"]

    def started(*more: str, words: Sequence[str] = words) -> int:
        monkeypatch.setattr(sys, "argv", ["skvr-retention", *words, *more])
        return retention.run()

    found = tmp_path / "found.json"
    assert started("--gate", "every:2+int4+window:8=9", "--json", str(found)) == 0
    assert "Scales and zero points come on top: int4 caches hold 2.000 times" in capsys.readouterr().out
    points = json.loads(found.read_text())["points"]
    assert [(p["strategy"], p["bits"], p["window"]) for p in points[3:6]] == [
        ("full", 4, 8),
        ("every:2", 16, None),
        ("every:2", 16, 8),
    ]
    twice = ("--gate", "every:2=-9", "--gate", "every:2=9")
    assert started(*twice) == started(*twice, "--json", str(found), words=words[:11]) == 1
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # whose folder is no place for a picture
    assert started("--json", str(tmp_path / "pipe"), words=words[:11]) == 0 and os.read(reader, 1) == b"{"
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".json", ".png"]
    assert started("--recent", "5") == 0
    assert ", and the last 1 tokens, which are not quantized yet, come on top: at most int4" in capsys.readouterr().out
    with pytest.raises(UserError, match="--recent 16 quantizes nothing of sequences of 16 tokens before it is read"):
        started("--recent", "16")
    with pytest.raises(UserError, match="--gate every:3 is on no combination that is measured; name one of full,"):
        started("--gate", "every:3=1")
    with pytest.raises(UserError, match="leave out --png"):
        started("--png", str(tmp_path / "x.png"))
