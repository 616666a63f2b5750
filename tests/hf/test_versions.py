"""Versions of transformers differ in names and in what they pass along; whichever is installed, nothing is lost.

These tests run with the locked versions and with the newest ones (`make test-newest`).
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from support.hf_models import STRATEGIES, edit_config, prompts, random_weights, reference_tokens, routed_model, shape_of
from transformers import DynamicCache, GenerationConfig, dynamic_module_utils
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from skvr_dist.errors import UserError
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import ExportMismatchError, export_model
from skvr_dist.hf.convert.update_code import update_code
from skvr_dist.hf.model import causal_lm
from skvr_dist.hf.model.layers import CACHE
from skvr_dist.hf.model.rcla import disable_rcla, enable_rcla
from skvr_dist.routing import CacheStrategy, RoutingConfig

CONFIG = shape_of("qwen3")
TRAINING = Training(RoutingConfig(policy="strategy", cross_layer_prob=0.5), {}, profiles={"half": "every:2"})


@pytest.fixture(scope="module")
def model() -> Any:
    return routed_model(CONFIG)


GIVEN: dict[str, Callable[[Any, torch.Tensor, DynamicCache], Any]] = {
    "by position": lambda model, tokens, cache: model(tokens, None, None, cache),
    "as cache": lambda model, tokens, cache: model(tokens, cache=cache),
    "as past_key_values": lambda model, tokens, cache: model(tokens, past_key_values=cache),
}


@pytest.mark.parametrize("part", ["causal model", "base model", "plain causal model"])
@pytest.mark.parametrize("way", GIVEN)
@pytest.mark.parametrize("strategy", [(0, 1, 2, 3, 4, 5, 6, 7), STRATEGIES["every:4"]], ids=["full", "every:4"])
@torch.no_grad()
def test_a_cache_is_used_under_either_name(model: Any, part: str, way: str, strategy: tuple[int, ...]) -> None:
    if part == "plain causal model":  # of transformers, with our layers inside
        model = transformers.Qwen3ForCausalLM(model.config).eval()
        enable_rcla(model)
        disable_rcla(model)
        model.model.kv_sources = CacheStrategy(8, strategy).kv_source_layers
    else:
        model.set_cache_strategy(strategy)
    called = model.model if part == "base model" else model
    tokens, cache = prompts(), DynamicCache(config=model.config)
    whole = called(tokens, use_cache=False)[0]
    parts = [GIVEN[way](called, tokens[:, start : start + 4], cache)[0] for start in (0, 4, 8)]
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_goes_on_from_a_cache_under_either_name(model: Any, name: str) -> None:
    model.set_cache_strategy(STRATEGIES["every:2"])
    options = {"do_sample": False, "pad_token_id": 0}
    wanted = model.generate(prompts(), max_new_tokens=8, **options)
    held = DynamicCache(config=model.config)
    first = model.generate(prompts(), max_new_tokens=4, **{name: held}, **options)
    assert held.get_seq_length() == 15  # all but the last token
    assert torch.equal(model.generate(first, max_new_tokens=4, **{name: held}, **options), wanted)


def refusals(cache: DynamicCache) -> dict[str, tuple[dict[str, Any], str]]:
    twice = {"cache": cache, "past_key_values": DynamicCache()}
    return {
        "twice": (twice, "the cache was given twice, as cache and as past_key_values"),
        "another name": ({"cache_params": cache}, "unexpected keyword argument 'cache_params', a DynamicCache"),
        "a misspelt name": ({"attention_maks": None}, "unexpected keyword argument 'attention_maks'"),
        "the name of something else": (
            {"num_items_in_batch": cache},
            "num_items_in_batch holds a cache that would not",
        ),
        "tuples": ({"past_key_values": ((torch.ones(1), torch.ones(1)),)}, "past_key_values is a tuple, not a Cache"),
    }


@pytest.mark.parametrize("kind", refusals(DynamicCache()))
def test_what_nobody_reads_is_refused(model: Any, kind: str) -> None:
    arguments, sentence = refusals(DynamicCache(config=model.config))[kind]
    for called in (model, model.model):
        with pytest.raises(TypeError, match=sentence):
            called(prompts(), **arguments)


def test_what_transformers_passes_along_is_taken(model: Any) -> None:
    model.set_cache_strategy("full")
    kwargs = {"num_items_in_batch": torch.tensor(100), "output_hidden_states": True, "return_dict": False}
    labels = prompts()
    loss, logits, *_ = model(prompts(), labels=labels, use_cache=False, **kwargs)
    mean = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, mean * labels[:, 1:].numel() / 100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(prompts(), labels=labels, shift_labels=shifted).loss, mean)


@pytest.mark.parametrize("strategy", ["full", "every:2"])
def test_continuous_batching(model: Any, strategy: str) -> None:
    """Requests of several lengths share a batch, in pages that belong to no `Cache`."""
    model.set_cache_strategy(strategy)
    wanted = reference_tokens(CONFIG, model.retained_layers, prompts()[:3], 6)[:, 12:]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # it would take most of the memory there is
    found = model.generate_batch(prompts()[:3].tolist(), options, pages)
    assert sorted(request.generated_tokens for request in found.values()) == sorted(wanted.tolist())


def lose_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a version that calls the cache by another name did to code that takes any keyword."""
    monkeypatch.setattr(causal_lm, "take_cache", lambda given, kwargs: kwargs.pop(CACHE, None) and None)


@pytest.mark.parametrize("pruned_to", [None, CacheStrategy(8, (0, 4))], ids=["whole", "pruned"])
def test_an_export_that_decodes_wrongly_is_not_published(
    pruned_to: CacheStrategy | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(CONFIG)
    lose_the_cache(monkeypatch)
    with pytest.raises(ExportMismatchError, match=r"greedy decoding at .* with a (dynamic|static) cache") as error:
        export_model(
            CONFIG,
            weights,
            weights.__getitem__,
            None,
            tmp_path / "out",
            training=TRAINING,
            dtype=torch.float32,
            pruned_to=pruned_to,
        )
    check = error.value.report.check
    assert check.relative_logit_difference < 1e-5  # without a cache nothing is wrong
    assert len(check.decoding_errors) == 2 * len(check.strategies) == (6 if pruned_to is None else 2)
    assert not list(tmp_path.iterdir())


def test_a_newer_transformers_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert causal_lm._find_fault() is None
    lose_the_cache(monkeypatch)
    fault = causal_lm._find_fault()
    assert fault is not None
    assert f"transformers {transformers.__version__} is newer than {causal_lm.NEWEST_TESTED}" in fault
    assert "Qwen3ForCausalLM decodes otherwise with a cache than without; install transformers" in fault
    monkeypatch.setattr(causal_lm, "_fault", fault)
    for use in (lambda: routed_model(CONFIG), lambda: enable_rcla(transformers.Qwen3ForCausalLM(TINY))):
        with pytest.raises(UserError, match="decodes otherwise with a cache than without"):
            use()


TINY = transformers.Qwen3Config(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)


def test_a_tested_transformers_is_not_tried() -> None:
    installed = Version(transformers.__version__).release[:2]
    assert installed <= causal_lm.NEWEST_TESTED.release, "run all tests with it, then raise NEWEST_TESTED"


def export_of(folder: Path, **options: Any) -> Path:
    weights = random_weights(CONFIG)
    export_model(
        CONFIG,
        weights,
        weights.__getitem__,
        None,
        folder,
        training=TRAINING,
        dtype=torch.float32,
        max_shard_size="40KB",
        **options,
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code of exports to."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        yield


def decode(folder: Path) -> list[int]:
    """Eight tokens by the code inside an export, which transformers loads from a copy of it."""
    model_class = get_class_from_dynamic_module("modeling_skvr.Qwen3ForCausalLM", str(folder))
    assert not model_class.__module__.startswith("skvr_dist")
    model, prompt = model_class.from_pretrained(folder, kv_profile="half"), torch.arange(1, 13)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 12:].tolist()


def test_old_code_of_an_export_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that loses the cache, as that of version 0.1.0 does from transformers 5.24 on."""
    folder = export_of(tmp_path / "out")
    code = folder / "modeling_skvr.py"
    today, forget = code.read_text(), "take_cache = lambda given, kwargs: kwargs.pop(CACHE, None) and None\n"
    code.write_text(today + forget)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file != code}

    prompt = torch.arange(1, 13)[None]
    wanted = reference_tokens(CONFIG, STRATEGIES["every:2"], prompt, 8)[0, 12:].tolist()
    assert decode(folder) != wanted
    monkeypatch.setattr("sys.argv", ["update_export.py", str(folder), "--json", str(tmp_path / "figures.json")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[2] / "tools/update_export.py"), run_name="__main__")
    assert end.value.code == 0
    assert "| changed code files" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["changed_files"] == ["modeling_skvr.py"] and figures["failures"] == []
    assert list(figures["logit_differences"]) == ["full", "every:2", "prefix:4", "half"]
    assert code.read_text() == today
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file != code} == before
    assert decode(folder) == wanted


def test_a_pruned_export_is_compared_at_the_profiles_that_it_has(tmp_path: Path) -> None:
    """Earlier ones name profiles that retain pruned layers, too."""
    folder = export_of(tmp_path / "out", pruned_to=CacheStrategy(8, (0, 4)))
    assert json.loads((folder / "config.json").read_text())["kv_profiles"] == {}
    edit_config(kv_profiles={"half": "every:2", "least": "0"})(folder)
    report = update_code(folder)
    assert (list(report.logit_differences), report.failures()) == (["0,4", "least"], [])


def test_code_is_not_replaced_where_the_model_would_change(tmp_path: Path) -> None:
    folder = export_of(tmp_path / "out")
    code = folder / "configuration_skvr.py"
    for change, failure in (
        (
            "CacheStrategy.parse(strategy_text(kv_profile), layers, profiles)",
            "strategy every:2 retains other layers than before",
        ),
        ("nothing", ""),
    ):
        text = code.read_text()
        assert change == "nothing" or change in text
        code.write_text(text.replace(change, "CacheStrategy.full(layers)"))
        report = update_code(folder)
        assert failure in "; ".join(report.failures()) and bool(failure) == bool(report.failures())
        assert (code.read_text() == text) == (not failure)
        code.write_text(text)

    edit_config(kv_profile="quarter")(folder)
    with pytest.raises(UserError, match=r"cannot be loaded \(cannot read .* 'quarter'; .*\); correct that, or"):
        update_code(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json refers to no code, not to modeling_skvr; name an export"):
        update_code(folder)
    with pytest.raises(UserError, match=r"is not an export: its config.json cannot be read"):
        update_code(tmp_path)
