"""The decoder on one process: backends, skipped keys and values, caches, slices, initial weights."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from support import flash_on_cpu
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama import LlamaConfig

from skvr_dist.config.model import AttentionName, ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.evaluate.generate import cache_bytes, generate
from skvr_dist.model.attention import BACKENDS, AttentionScope, attend
from skvr_dist.model.decoder import Decoder, DecoderLayer, initialize, next_token_loss
from skvr_dist.model.rope import inverse_frequencies, rope_tables, rotate
from skvr_dist.parallel.split import layer_and_head_operations, stage_bounds
from skvr_dist.routing import CacheStrategy

LAYERS = 6


def config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "architecture": "qwen3",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "qk_norm": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return ModelConfig.model_validate({**shape, **changes})


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    model = Decoder(config())
    initialize(model, seed=3)
    return model


def tokens(batch: int, sequence: int) -> torch.Tensor:
    return torch.randint(0, 61, (batch, sequence), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_backends_agree(backend: str, queries: int, keys: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the formula: what they return, and the gradients of queries, keys and values."""
    flash_on_cpu.give_to_torch(monkeypatch)
    inputs = [torch.randn(2, queries, 4, 8), *torch.randn(2, 2, keys, kv_heads, 8)]
    upstream = torch.randn(2, queries, 4, 8)
    found = []
    for name in (backend, "eager"):
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = attend(q, k, v, AttentionScope(name))
        found.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    for ours, formula in zip(*found, strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-5, atol=1e-5)


def test_backend_names() -> None:
    # `routed` is no backend of `attend`: it reads from an arena.
    names = {"auto", "flash", "routed", *BACKENDS}
    assert names == set(get_args(AttentionName)), "`model.attention` and `BACKENDS` name others"
    with pytest.raises(ValueError, match="'fsah' is not one of"):
        attend(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), AttentionScope("fsah"))


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=["default", "linear", "llama3"])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    ours = inverse_frequencies(config(head_dim=64, rope_scaling=scaling, max_position_embeddings=512))
    if scaling is None:
        theirs = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    else:
        parameters = {**scaling, "rope_theta": 10000.0}
        published = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters)
        theirs, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](published, torch.device("cpu"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_rotation_tables_are_fp32_and_tell_far_positions_apart_in_bf16() -> None:
    cos, sin = rope_tables(config(), torch.arange(2000))
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.ones(1, 2000, 1, 8, dtype=torch.bfloat16)
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    exact = rotate(x.float(), cos, sin)
    assert (rotated.float() - exact).abs().max() < 0.01  # rounding of the result, not of the angle


def test_unread_keys_and_values_are_not_computed_yet_get_zero_gradients(decoder: Decoder) -> None:
    donors = [0, 0, 2, 2, 0, 2]  # nobody reads layers 1, 3, 4 and 5
    computed = []
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(lambda *_, n=number, p=name: computed.append((int(n), p)))
        for number, layer in decoder.layers.items()
        for name in ("k_proj", "v_proj", "k_norm")
    ]
    batch = tokens(2, 9)
    next_token_loss(decoder(batch[:, :-1], donors), batch[:, 1:]).backward()
    for hook in hooks:
        hook.remove()
    assert sorted(computed) == [(layer, name) for layer in (0, 2) for name in ("k_norm", "k_proj", "v_proj")]
    for number, layer in decoder.layers.items():
        assert isinstance(layer, DecoderLayer)
        for parameter in layer.self_attn.kv_parameters():
            assert parameter.grad is not None
            assert (parameter.grad.count_nonzero() > 0) == (int(number) in (0, 2))
        query_gradient = layer.get_parameter("self_attn.q_proj.weight").grad
        assert query_gradient is not None and query_gradient.count_nonzero() > 0
    decoder.zero_grad()


@pytest.mark.parametrize("spec", ["full", "every:2", "every:4", "prefix:2", "0,3"])
def test_decoding_with_a_cache_is_the_full_computation(decoder: Decoder, spec: str) -> None:
    strategy = CacheStrategy.parse(spec, LAYERS)
    batch = tokens(2, 16)
    with torch.no_grad():
        whole = decoder(batch, strategy.kv_source_layers)
        cache: dict = {}
        pieces = [decoder(part, strategy.kv_source_layers, cache) for part in batch.split([7, 4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert tuple(sorted(cache)) == strategy.retained
    per_token = strategy.cache_bytes_per_token(kv_heads=2, head_dim=8, bytes_per_element=4)
    assert cache_bytes(cache) == 2 * 16 * per_token


def test_greedy_continuation(decoder: Decoder) -> None:
    strategy = CacheStrategy.every(2, LAYERS)
    prompt = tokens(1, 5)[0]
    new, cache = generate(decoder, prompt, strategy, max_new_tokens=6)
    text = prompt
    with torch.no_grad():
        for _ in range(6):  # without a cache, all over again for each token
            text = torch.cat([text, decoder(text[None], strategy.kv_source_layers)[0, -1:].argmax(-1)])
    assert new.tolist() == text[5:].tolist()
    assert cache[0].k.shape[1] == 5 + 6 - 1  # the last token was not read yet
    sampled = [
        generate(decoder, prompt, strategy, max_new_tokens=6, temperature=5.0, seed=s)[0].tolist() for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    stopped, _ = generate(decoder, prompt, strategy, max_new_tokens=6, stop_tokens=[int(new[2])])
    assert stopped.tolist() == new[: new.tolist().index(int(new[2]))].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_slices_hold_the_weights_and_names_of_the_whole(tied: bool) -> None:
    whole = Decoder(config(tie_word_embeddings=tied))
    initialize(whole, seed=1)
    wanted = dict(whole.named_parameters())
    found: dict[str, int] = {}
    for start, stop in ((0, 1), (1, 4), (4, LAYERS)):
        part = Decoder(config(tie_word_embeddings=tied), start, stop)
        initialize(part, seed=1)
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, wanted[name])
            found[name] = found.get(name, 0) + 1
    assert set(found) == set(wanted)
    assert {name for name, count in found.items() if count > 1} == ({"embed_tokens.weight"} if tied else set())


def test_initial_weights_depend_on_the_seed_and_the_name() -> None:
    one, two = Decoder(config()), Decoder(config())
    initialize(one, seed=1)
    initialize(two, seed=2)
    first, second = "layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"
    assert not torch.equal(one.get_parameter(first), two.get_parameter(first))
    assert not torch.equal(one.get_parameter(first), one.get_parameter(second))
    assert one.get_parameter(first).std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("stages", [1, 2, 3, 6])
@pytest.mark.parametrize(("vocab_size", "sequence"), [(8, 16), (500, 16), (20_000, 16), (20_000, 100_000)])
def test_the_split_makes_the_dearest_stage_as_cheap_as_possible(stages: int, vocab_size: int, sequence: int) -> None:
    model = config(vocab_size=vocab_size)

    def dearest(bounds: list[tuple[int, int]]) -> int:
        layer, head = layer_and_head_operations(model, sequence)
        stages = [(stop - start) * layer for start, stop in bounds]
        return max([*stages[:-1], stages[-1] + head])

    def splits(first: int, count: int) -> list[list[tuple[int, int]]]:
        if count == 1:
            return [[(first, LAYERS)]]
        return [
            [(first, stop), *rest] for stop in range(first + 1, LAYERS - count + 2) for rest in splits(stop, count - 1)
        ]

    bounds = stage_bounds(model, ParallelConfig(pipeline=stages), sequence)
    assert bounds[0][0] == 0 and bounds[-1][1] == LAYERS and all(start < stop for start, stop in bounds)
    assert dearest(bounds) == min(dearest(split) for split in splits(0, stages))


def test_thousands_of_stages_are_split() -> None:
    model = config().model_copy(update={"num_hidden_layers": 10_000})
    bounds = stage_bounds(model, ParallelConfig(pipeline=5_000), 16)
    assert len(bounds) == 5_000 and bounds[-1][1] == 10_000


def test_stages_by_hand() -> None:
    assert stage_bounds(config(), ParallelConfig(pipeline=3, stage_layers=[1, 4, 1]), 16) == [(0, 1), (1, 5), (5, 6)]
