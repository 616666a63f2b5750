"""Our classes of transformers compute what our decoder does at any strategy, and what the plain ones do at full."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.flash_on_cpu import give_to_transformers
from support.hf_models import CLASSES, STRATEGIES, load_into, random_weights, routed_model, shape_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

LAYERS = 8
TOLERANCE = 1e-5
"""Of the largest logit."""
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MODELS = {
    "qwen3": shape_of("qwen3"),
    "llama": shape_of("llama", tie_word_embeddings=True, attention_bias=True, rope_scaling=LLAMA3),
    "qwen2": shape_of("qwen2"),
    "mistral": shape_of("mistral", num_key_value_heads=4),
}


def tokens(batch: int = 2, length: int = 60) -> Tensor:
    return torch.randint(1, 101, (batch, length), generator=torch.Generator().manual_seed(3))


def decoder_of(config: ModelConfig) -> Decoder:
    decoder = Decoder(config)
    decoder.load_state_dict(random_weights(config))
    return decoder


def assert_close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_logits_of_our_decoder(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoder, x = routed_model(config), decoder_of(config), tokens()
    for spec, retained in {"full": tuple(range(LAYERS)), **STRATEGIES}.items():
        model.set_cache_strategy(spec if spec != "irregular" else retained)
        assert model.retained_layers == retained
        wanted = decoder(x, CacheStrategy(LAYERS, retained).kv_source_layers)
        for kernel in ("sdpa", "eager", give_to_transformers(monkeypatch)):
            model.set_attn_implementation(kernel)
            assert_close(model(x).logits, wanted)
            for keep in (1, 5, 60, 99):  # layers above the last retained one run on these positions alone
                assert_close(model(x, logits_to_keep=keep).logits, wanted[:, -keep:])


@torch.no_grad()
def test_full_retention_is_the_plain_class() -> None:
    config = MODELS["qwen3"]
    plain = load_into(Qwen3ForCausalLM(hf_config(config, torch.float32, {})), random_weights(config))
    model, x = routed_model(config), tokens()
    assert torch.equal(plain(x).logits, model(x).logits)
    found, wanted = (m(x, output_hidden_states=True, output_attentions=True, logits_to_keep=1) for m in (model, plain))
    assert len(found.hidden_states) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))
    for m in (model, plain):
        m.set_attn_implementation("eager")
    found, wanted = (m(x, output_attentions=True).attentions for m in (model, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert model.state_dict().keys() == plain.state_dict().keys()


class Counter:
    """Positions that went through a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.positions = 0
        module.register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, args: Any, output: Tensor) -> None:
        self.positions += output.shape[0] * output.shape[1]


@torch.no_grad()
def test_work_that_is_skipped() -> None:
    """With 3 of 8 layers retained, 3 compute keys and values, and 5 and a half see the last position alone."""
    model = routed_model(MODELS["qwen3"])
    model.set_cache_strategy("prefix:3")
    keys = [Counter(layer.self_attn.k_proj) for layer in model.model.layers]
    mlps = [Counter(layer.mlp) for layer in model.model.layers]
    model(tokens(1), logits_to_keep=1)
    assert [counter.positions for counter in keys] == [60] * 3 + [0] * 5
    assert [counter.positions for counter in mlps] == [60] * 2 + [1] * 6


def test_gradient_checkpointing_at_a_strategy() -> None:
    model, x = routed_model(MODELS["qwen3"]).train(), tokens()
    model.set_cache_strategy(STRATEGIES["irregular"])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert len(plain) == len(list(model.parameters())) - 4 * 3  # of four readers: projections and norm of keys
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@torch.no_grad()
def test_keys_live_as_long_as_they_are_read() -> None:
    """Else an offloaded or a quantized cache would save nothing: its layers are whole again while they are read."""
    model = routed_model(MODELS["qwen3"])
    handed_out: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count(*_: Any) -> None:
        alive.append(sum(reference() is not None for reference in handed_out))

    def remember(_: torch.nn.Module, __: Any, output: Any) -> None:
        handed_out.extend(weakref.ref(tensor) for tensor in output[1:] if tensor is not None)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(count)
        layer.register_forward_hook(remember)
    for strategy, wanted in {"full": [0] * 8, "every:4": [0, 2, 2, 2, 0, 2, 2, 2]}.items():
        model.set_cache_strategy(strategy)
        alive.clear()
        model(tokens(), use_cache=False)
        assert alive == wanted


@pytest.fixture(params=["sdpa", "flash"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An implementation of attention, by the name that transformers has for it."""
    return give_to_transformers(monkeypatch) if request.param == "flash" else request.param


@torch.no_grad()
def test_left_padding(kernel: str) -> None:
    model, decoder = routed_model(MODELS["llama"]), decoder_of(MODELS["llama"])
    model.set_attn_implementation(kernel)
    model.set_cache_strategy("prefix:3")
    short = tokens(1, 20)
    padded = torch.cat((torch.zeros(1, 15, dtype=torch.long), short), dim=1)
    both = torch.cat((padded, tokens(1, 35)))
    mask = torch.ones_like(both)
    mask[0, :15] = 0
    sources = CacheStrategy.prefix(3, LAYERS).kv_source_layers
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for keep in (0, 1, 4):
        found = model(both, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits
        wanted = decoder(short, sources)[0]
        assert_close(found[0, -(keep or 20) :], wanted[-(keep or 20) :])
        assert_close(found[1], decoder(both[1:], sources)[0, -keep:])


@torch.no_grad()
def test_packed_texts(kernel: str) -> None:
    """Positions that begin anew in the middle keep texts apart, also where only the last logits are wanted."""
    model, decoder = routed_model(MODELS["qwen3"]), decoder_of(MODELS["qwen3"])
    model.set_attn_implementation(kernel)
    model.set_cache_strategy("prefix:3")
    first, second = tokens(1, 9), tokens(1, 20)[:, 9:]
    positions = torch.cat((torch.arange(9), torch.arange(11)))[None]
    packed = torch.cat((first, second), dim=1)
    sources = CacheStrategy.prefix(3, LAYERS).kv_source_layers
    wanted = torch.cat((decoder(first, sources), decoder(second, sources)), dim=1)
    for keep in (0, 1, 4, 12):
        found = model(packed, position_ids=positions, logits_to_keep=keep, use_cache=False).logits
        assert_close(found, wanted[:, -keep:])


@torch.no_grad()
def test_compiled() -> None:
    model = routed_model(MODELS["qwen3"])
    model.set_cache_strategy("every:4")
    x = tokens()
    wanted = model(x, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x, use_cache=False).logits, wanted)


def test_copies(tmp_path: Path) -> None:
    model = routed_model(MODELS["mistral"])
    model.set_cache_strategy("every:2")
    x = tokens()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).logits, model(x).logits)
    model.save_pretrained(tmp_path)
    again = CLASSES["mistral"].routed.from_pretrained(tmp_path, kv_profile="every:2")
    assert torch.equal(again(x).logits, model(x).logits)


def test_what_the_auto_class_makes(tmp_path: Path) -> None:
    config = hf_config(MODELS["llama"], torch.float32, {})
    plain = AutoModelForCausalLM.from_config(config)
    assert type(plain).__module__.startswith("transformers.")
    plain.save_pretrained(tmp_path)

    def load(**options: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path, **options)

    assert type(load()) is type(plain)
    assert load(kv_profile="prefix:2").retained_layers == (0, 1)
    assert load(kv_source_layers=[0, 0, 2, 2, 2, 2, 2, 2]).retained_layers == (0, 2)
    config.kv_profiles, config.kv_profile = {"bulk": "every:4"}, "bulk"
    config.save_pretrained(tmp_path)
    assert load().retained_layers == (0, 4)
    assert load(kv_profile="full").retained_layers == tuple(range(LAYERS))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"kv_profile": "bulky"}, r"cannot read cache strategy 'bulky'; .* or a named profile \(bulk\)$"),
        ({"kv_profile": "1,3"}, r"\[1, 3\] does not retain layer 0"),
        ({"kv_profile": "0,8"}, r"retains layer 8, but the model has layers 0 to 7"),
        ({"kv_profile": 4}, r"\[4\] does not retain layer 0"),
        ({"kv_source_layers": [0.0] * 8}, r"must be a list of layer numbers, one for each of 8 layers"),
        ({"kv_source_layers": [0] * 7}, r"names 7 sources, but the model has 8 layers; name one for each"),
        (
            {"kv_source_layers": [0, 2, 2, 2, 2, 2, 2, 2]},
            r"layer 1 cannot read layer 2; its source must be one",
        ),
        (
            {"kv_source_layers": [0, 0, 1, 3, 3, 3, 3, 3]},
            r"layer 2 reads layer 1, which keeps no cache but reads layer 0; name layer 0, or let layer 1 read itself",
        ),
    ],
)
def test_impossible_strategies(options: dict[str, Any], shown: str) -> None:
    config = hf_config(MODELS["qwen3"], torch.float32, {})
    config.kv_profiles = {"bulk": "every:4"}
    with pytest.raises(UserError, match=shown):
        CLASSES["qwen3"].routed(config, **options)


def test_warns_of_a_model_that_never_shared(caplog: pytest.LogCaptureFixture) -> None:
    config = hf_config(shape_of("qwen3", num_hidden_layers=7), torch.float32, {})  # each message appears once
    with caplog.at_level(logging.WARNING):
        CLASSES["qwen3"].routed(config)
        config.kv_training = {"policy": "uniform", "cross_layer_prob": 0.5}
        CLASSES["qwen3"].routed(config, kv_profile="every:2")
        assert not caplog.records
        config.kv_training = {"policy": "none", "retention_table": "| every:2 | +0.4 |"}
        CLASSES["qwen3"].routed(config, kv_profile="every:2")
        del config.kv_training
        CLASSES["qwen3"].routed(config, kv_profile="every:4")
    measured, unmeasured = (record.getMessage() for record in caplog.records)
    assert "4 of 7 layers keep a cache, but this checkpoint was not trained with stochastic KV routing" in measured
    assert measured.endswith("measured:\n| every:2 | +0.4 |")
    assert unmeasured.startswith("2 of 7 layers") and unmeasured.endswith("measure it before you use it")


@pytest.mark.parametrize("layers", [[0, 2], (0, 2), range(0, 3, 2), torch.tensor([0, 2]), np.array([0, 2])], ids=repr)
def test_layers_are_taken_from_any_sequence_of_whole_numbers(layers: Any) -> None:
    model = routed_model(shape_of("qwen3"))
    model.set_cache_strategy(layers)
    assert model.retained_layers == (0, 2)
    model.set_cache_strategy([layer for layer in layers])  # of tensors or numpy's integers  # noqa: C416
    assert model.retained_layers == (0, 2)


@pytest.mark.parametrize("layers", [0, None, 1.5, [0, 1.0], [0, True], [0, "2"], torch.tensor([0.0, 2.0])], ids=repr)
def test_what_lists_no_layers_is_refused(layers: Any) -> None:
    with pytest.raises(UserError, match="does not list layers; give their numbers"):
        routed_model(shape_of("qwen3")).set_cache_strategy(layers)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"half": "prefix:99"}, "kv_profiles: half cannot be: cache strategy prefix:99 is outside"),
        ({"half": "every:x"}, "kv_profiles: half cannot be: cannot read cache strategy"),
        (["every:2"], r"kv_profiles \['every:2'\] must name strategies"),
    ],
)
def test_published_profiles_that_cannot_be_are_refused(profiles: Any, message: str) -> None:
    config = shape_of("qwen3")
    model = routed_model(config)
    model.config.kv_profiles = profiles
    with pytest.raises(UserError, match=message):
        model.set_cache_strategy("every:2")
