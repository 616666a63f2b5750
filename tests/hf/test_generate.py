"""`generate` at four strategies and with every cache class: the tokens of the plain reference, the bytes expected."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimum.quanto.library.extensions import cpp as quanto_cpp
from support.flash_on_cpu import give_to_transformers
from support.hf_models import STRATEGIES, prompts, random_weights, reference_tokens, routed_model, shape_of
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedTokenizerFast, StaticCache
from transformers.cache_utils import CacheLayerMixin, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from skvr_dist.errors import UserError
from skvr_dist.model.decoder import KV, Decoder
from skvr_dist.routing import CacheStrategy

CONFIG = shape_of("qwen3")
LAYERS = CONFIG.num_hidden_layers
PROMPT_LENGTH, NEW_TOKENS = 12, 64


@pytest.fixture(scope="module", autouse=True)
def quanto_without_a_compiler() -> Iterator[None]:
    """Quanto would compile a kernel for a minute, one that takes packed numbers apart."""

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quanto_cpp.ext, "_lib", SimpleNamespace(unpack=unpack))
        yield


class Stream(contextlib.nullcontext[None]):
    """Stands for a stream of a GPU."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


@pytest.fixture(scope="module", autouse=True)
def offloading_without_a_gpu() -> Iterator[None]:
    """A layer that transformers' cache sends away is full of NaN until it is fetched; only a GPU has the real thing."""

    def send_away(layer: Any) -> None:
        if layer.is_initialized and getattr(layer, "away", None) is None:
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = (torch.full_like(part, torch.nan) for part in layer.away)

    def fetch(layer: Any) -> None:
        if getattr(layer, "away", None) is not None:
            (layer.keys, layer.values), layer.away = layer.away, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", Stream)
        patch.setattr(torch.cuda, "default_stream", lambda device: Stream())
        patch.setattr(CacheLayerMixin, "offload", send_away)
        patch.setattr(CacheLayerMixin, "prefetch", fetch)
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return routed_model(CONFIG)


@cache
def wanted_tokens(retained: tuple[int, ...]) -> Tensor:
    return reference_tokens(CONFIG, retained, prompts(), NEW_TOKENS)


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    return model.generate(
        prompts() if inputs is None else inputs,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, **options},
    )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every plain tensor that an object holds."""
    if hasattr(value, "__tensor_flatten__"):
        yield from (t for name in value.__tensor_flatten__()[0] for t in tensors_in(getattr(value, name)))
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in tensors_in(item))
    elif isinstance(value, tuple | list):
        yield from (t for item in value for t in tensors_in(item))


def cache_bytes(filled: Cache) -> int:
    parts = ("keys", "values", "_quantized_keys", "_quantized_values")
    held = (getattr(layer, part, None) for layer in filled.layers for part in parts)
    return sum(t.nbytes for value in held for t in tensors_in(value))


CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "static, prefill in chunks": {"cache_implementation": "static", "prefill_chunk_size": 5},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded, static": {"cache_implementation": "offloaded_static"},
    "quanto": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 16},
    },
    "hqq": {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1, "q_group_size": 8},
    },
}


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_bytes(model: Any, options: dict[str, Any]) -> None:
    """Retention x full, exactly."""
    model.set_cache_strategy("full")
    full = cache_bytes(generate(model, prompts()[:2], max_new_tokens=20, **options).past_key_values)
    for retained in STRATEGIES.values():
        model.set_cache_strategy(retained)
        found = cache_bytes(generate(model, prompts()[:2], max_new_tokens=20, **options).past_key_values)
        assert found * LAYERS == full * len(retained)


@pytest.mark.parametrize("retained", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("kind", [kind for kind, options in CACHES.items() if "cache_config" not in options])
def test_greedy_tokens(model: Any, kind: str, retained: tuple[int, ...]) -> None:
    model.set_cache_strategy(retained)
    found = generate(model, **CACHES[kind])
    assert torch.equal(found.sequences, wanted_tokens(retained))
    assert type(found.past_key_values) is (StaticCache if "static" in kind else DynamicCache)
    if "offloaded" in kind:
        held = [layer for layer in found.past_key_values.layers if layer.is_initialized]
        assert all(layer.away is not None for layer in held[1:])


def test_compiled_decoding(model: Any) -> None:
    """With a static cache `generate` compiles each step by itself on a GPU, and here if told to."""
    graphs: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, mode=None, backend=run_as_it_is)
    config._compile_all_devices = True
    model.set_cache_strategy("every:4")
    torch._dynamo.reset()
    found = generate(model, **CACHES["static"], compile_config=config).sequences
    assert torch.equal(found, wanted_tokens(STRATEGIES["every:4"]))
    assert len(graphs) == 1


@torch.no_grad()
def quantized_reference(kind: str, retained: tuple[int, ...], inputs: Tensor, count: int) -> Tensor:
    """Greedy tokens of our decoder when its cache goes through the same quantisation after every step."""
    config = {name: value for name, value in CACHES[kind]["cache_config"].items() if name != "backend"}
    kinds: dict[str, type[QuantizedLayer]] = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}
    stores = {layer: kinds[kind](**config) for layer in retained}
    decoder = Decoder(CONFIG)
    decoder.load_state_dict(random_weights(CONFIG))
    sources = CacheStrategy(LAYERS, retained).kv_source_layers
    held: dict[int, KV] = {}
    new, found = inputs, inputs
    for _ in range(count):
        token = decoder(new, sources, held)[:, -1].argmax(-1, keepdim=True)
        for layer, store in stores.items():
            added = [part[:, -new.shape[1] :].transpose(1, 2) for part in (held[layer].k, held[layer].v)]
            store.update(*added)
            parts = ((store._quantized_keys, store.keys), (store._quantized_values, store.values))
            stored = (
                torch.cat((store._dequantize(packed), recent), dim=-2)
                if recent.dim() == 4
                else store._dequantize(packed)
                for packed, recent in parts
            )
            held[layer] = KV(*(part.transpose(1, 2) for part in stored))
        new, found = token, torch.cat((found, token), dim=1)
    return found


@pytest.mark.parametrize("retained", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("kind", ["quanto", "hqq"])
def test_greedy_tokens_of_quantized_caches(model: Any, kind: str, retained: tuple[int, ...]) -> None:
    model.set_cache_strategy(retained)
    found = generate(model, **CACHES[kind]).sequences
    assert torch.equal(found, quantized_reference(kind, retained, prompts(), NEW_TOKENS))


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_left_padding(model: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = give_to_transformers(monkeypatch) if kernel == "flash" else kernel
    monkeypatch.setattr(model.config, "_attn_implementation", name)
    model.set_cache_strategy("prefix:3")
    lengths = [4, 12, 9]
    rows = [prompts()[i, :length] for i, length in enumerate(lengths)]
    padded = torch.stack([torch.cat((torch.zeros(12 - len(row), dtype=torch.long), row)) for row in rows])
    mask = torch.stack([(torch.arange(12) >= 12 - length).long() for length in lengths])
    found = generate(model, padded, attention_mask=mask, max_new_tokens=24).sequences[:, 12:]
    for row, continuation in zip(rows, found, strict=True):
        assert torch.equal(generate(model, row[None], max_new_tokens=24).sequences[0, len(row) :], continuation)


def test_sampling_and_beams_need_no_cache(model: Any) -> None:
    """The same draws and the same beams with and without a cache."""
    model.set_cache_strategy(STRATEGIES["irregular"])
    for options in ({"do_sample": True, "temperature": 0.7}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(4)
            options = {**options, "max_new_tokens": 16, "use_cache": use_cache}
            found.append(generate(model, prompts()[:3], **options).sequences)
        assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_stop_strings(model: Any, options: dict[str, Any]) -> None:
    """For these `generate` takes the tokenizer, which it then gives to every forward pass."""
    model.set_cache_strategy("every:2")
    characters = Tokenizer(BPE({chr(33 + number): number for number in range(101)}, merges=[]))
    characters.decoder = Fuse()
    words = PreTrainedTokenizerFast(tokenizer_object=characters)
    options = {**options, "max_new_tokens": 24}
    wanted = generate(model, prompts()[:1], **options).sequences[0].tolist()
    stop = wanted[PROMPT_LENGTH + 4]
    found = generate(model, prompts()[:1], **options, tokenizer=words, stop_strings=[chr(33 + stop)]).sequences[0]
    assert found.tolist() == wanted[: wanted.index(stop, PROMPT_LENGTH) + 1]


def test_assisted_by_itself_at_a_smaller_cache(model: Any) -> None:
    model.set_cache_strategy("every:2")
    assistant = routed_model(CONFIG)
    assistant.set_cache_strategy("prefix:3")
    found = generate(model, prompts()[:1], assistant_model=assistant, max_new_tokens=24).sequences
    assert torch.equal(found, wanted_tokens(STRATEGIES["every:2"])[:1, : PROMPT_LENGTH + 24])


@pytest.mark.parametrize("options", [{"assistant_early_exit": 4}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_drafts_of_its_own(model: Any, options: dict[str, Any]) -> None:
    model.set_cache_strategy("every:2")
    found = generate(model, prompts()[:1], max_new_tokens=24, **options).sequences
    assert torch.equal(found, wanted_tokens(STRATEGIES["every:2"])[:1, : PROMPT_LENGTH + 24])


def test_a_users_cache_goes_on_but_not_at_another_strategy(model: Any) -> None:
    model.set_cache_strategy("every:2")
    wanted = wanted_tokens(STRATEGIES["every:2"])
    held = DynamicCache()
    first = generate(model, past_key_values=held, max_new_tokens=10).sequences
    assert torch.equal(generate(model, first, past_key_values=held, max_new_tokens=54).sequences, wanted)
    model.set_cache_strategy("every:4")
    with pytest.raises(UserError, match=r"holds layers \[0, 2, 4, 6\], but .* reads layers \[0, 4\]; start with a new"):
        generate(model, first, past_key_values=held)
    model.set_cache_strategy("full")
    with pytest.raises(UserError, match=r"holds layers \[0, 2, 4, 6\]"):
        generate(model, first, past_key_values=held)
    empty = StaticCache(model.config, max_cache_len=40)
    generate(model, past_key_values=empty, max_new_tokens=2)
    empty.reset()
    model.set_cache_strategy("every:2")
    with pytest.raises(UserError, match=r"start with a new cache"):
        generate(model, past_key_values=empty, max_new_tokens=2)
