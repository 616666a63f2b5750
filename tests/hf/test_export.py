"""An export is the trained model, to transformers and to the last bit of its weights, or it is not published."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.tokenizers import train_hugging_face, train_normalizing, train_other, train_ours, train_unigram
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

import skvr_dist.hf.convert.export as export_module
from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import partial_folder, publish, step_folder, write_facts
from skvr_dist.checkpoint.pieces import WEIGHTS, Piece
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.errors import UserError
from skvr_dist.evaluate.intervals import Interval
from skvr_dist.evaluate.retention import RetentionPoint, as_records
from skvr_dist.files import as_json
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.check import SAMPLE_TEXTS, TOLERANCE
from skvr_dist.hf.convert.export import ExportMismatchError, ExportReport, export_model
from skvr_dist.hf.model.families import CLASSES
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy, RoutingConfig
from skvr_dist.schedule import Schedule

LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
TRAINING = Training(RoutingConfig(policy="uniform", cross_layer_prob=0.5), {"step": 1200})


def tiny(architecture: str, **changes: Any) -> ModelConfig:
    """A head size that is not hidden_size / heads, and a theta and epsilon that are nobody's default."""
    fields = {
        "architecture": architecture,
        "vocab_size": 704,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 777.0,
        "rms_norm_eps": 3e-4,
        "qk_norm": FAMILIES[architecture].qk_norm,
        "attention_bias": FAMILIES[architecture].attention_bias == "q, k and v",
        "tie_word_embeddings": False,
        **changes,
    }
    return ModelConfig(**fields)


MODELS = {
    "qwen3": tiny("qwen3"),
    "qwen3 tied, biased": tiny("qwen3", tie_word_embeddings=True, attention_bias=True),
    "llama tied": tiny("llama", tie_word_embeddings=True, rope_scaling=LLAMA3),
    "llama biased": tiny("llama", attention_bias=True, rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
    "qwen2": tiny("qwen2", head_dim=12),
    "qwen2 tied": tiny("qwen2", head_dim=12, tie_word_embeddings=True),
    "mistral": tiny("mistral"),
    "mistral tied": tiny("mistral", tie_word_embeddings=True, num_key_value_heads=4),
}


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Larger than initial weights and with uneven norms and biases, so that attention patterns and biases matter."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0)
        for name, tensor in Decoder(config).state_dict().items()
    }


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_ours(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def export(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    output: Path,
    tokenizer_file: Path | None = None,
    *,
    training: Training = TRAINING,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ExportReport:
    return export_model(
        config, weights, weights.__getitem__, tokenizer_file, output, training=training, dtype=dtype, **options
    )


def tamper(monkeypatch: pytest.MonkeyPatch, name: str, change: float) -> None:
    """Change one element of one weight after the files were written."""
    write = export_module.write_weights

    def write_and_tamper(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[name].view(-1)[-1] += change
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "write_weights", write_and_tamper)


def test_a_tokenizer_that_transformers_would_change_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    """It takes every tokenizer of a Qwen2 for Qwen's own; not of a pruned one, which is a type of ours."""
    config = tiny("qwen2", head_dim=12)
    weights = random_weights(config)
    train_hugging_face(tmp_path / "tokenizer.model")
    other = tmp_path / "hf/tokenizer.json"
    for file in (tokenizer_file, other):
        with pytest.raises(UserError, match="of any qwen2 model as Qwen2Tokenizer, which gives other ids than"):
            export(config, weights, tmp_path / "out", file)
    pruned = export(config, weights, tmp_path / "pruned", tokenizer_file, pruned_to=CacheStrategy(3, (0, 2)))
    assert pruned.check.tokenizer_texts and not pruned.check.differing_texts
    model = json.loads(other.read_text())["model"]
    Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).save_pretrained(
        tmp_path / "qwen"
    )
    export(config, weights, tmp_path / "out", tmp_path / "qwen/tokenizer.json")
    texts = list(SAMPLE_TEXTS)
    wanted = Qwen2Tokenizer.from_pretrained(tmp_path / "qwen")(texts)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(texts)["input_ids"] == wanted


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_transformers_computes_the_decoders_logits(config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(config)
    report = export(config, weights, tmp_path / "out")
    plain_class = CLASSES[config.architecture].plain
    model, info = plain_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    decoder = Decoder(config)
    decoder.load_state_dict(weights)
    # Longer than the sequences of the self-check, with a batch dimension.
    tokens = torch.randint(config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = decoder(tokens, range(3)), model(tokens).logits
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()

    assert report.parameters == sum(tensor.numel() for tensor in weights.values()) == model.num_parameters()
    assert report.check.positions == 4 * 128
    assert report.check.largest_logit > 1.0
    assert report.check.relative_logit_difference <= TOLERANCE
    assert report.file_bytes == {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    code = ["configuration_skvr.py", "modeling_skvr.py", "skvr_errors.py", "skvr_layers.py", "skvr_strategy.py"]
    others = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(report.file_bytes) == sorted(code + others)


def test_config_reloads_as_it_was(tmp_path: Path) -> None:
    export(MODELS["llama tied"], random_weights(MODELS["llama tied"]), tmp_path / "llama")
    config = AutoConfig.from_pretrained(tmp_path / "llama")
    assert config.rope_parameters == {**LLAMA3.model_dump(), "rope_theta": 777.0}
    assert (config.head_dim, config.rms_norm_eps, config.tie_word_embeddings) == (16, 3e-4, True)
    assert config.dtype == torch.float32
    stored = json.loads((tmp_path / "llama/config.json").read_text())
    assert (stored["rope_theta"], stored["rope_scaling"]) == (777.0, LLAMA3.model_dump())  # transformers 4 reads these

    export(MODELS["mistral"], random_weights(MODELS["mistral"]), tmp_path / "mistral")
    config = AutoConfig.from_pretrained(tmp_path / "mistral")
    assert config.sliding_window is None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 777.0}


@pytest.mark.parametrize("train", [train_ours, train_unigram, train_hugging_face, train_normalizing])
def test_tokenizer_and_card(train: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS["qwen3 tied, biased"]
    report = export(config, random_weights(config), tmp_path / "out", train(tmp_path / "tokenizer.model"))
    assert report.check.tokenizer_texts > 0
    assert report.check.positions > 300

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == config.max_position_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = {getattr(owner, name) for owner in (tokenizer, model.config, model.generation_config)}
        assert len(ids) == 1, name
    assert model.generate(max_new_tokens=3, do_sample=False).shape == (1, 4)  # a new document, from the end of one

    card = (tmp_path / "out/README.md").read_text()
    assert "policy `uniform`" in card
    for fact in ("full retention", "| cross_layer_prob | 0.5 ", "| step             | 1200 "):
        assert fact in card, fact
    example = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example[0], {})


def test_shards(tmp_path: Path) -> None:
    config = MODELS["qwen3"]
    weights = random_weights(config)
    report = export(config, weights, tmp_path / "out", max_shard_size="150KB")
    assert sum(name.endswith(".safetensors") for name in report.file_bytes) > 2
    assert "model.safetensors.index.json" in report.file_bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.model.state_dict().items())


def test_bfloat16_is_what_is_stored_and_checked(tmp_path: Path) -> None:
    config = MODELS["mistral tied"]
    weights = random_weights(config)
    report = export(config, weights, tmp_path / "out", dtype=torch.bfloat16)
    assert report.check.relative_logit_difference <= TOLERANCE
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, weights["norm.weight"].bfloat16())


@pytest.mark.parametrize(
    ("name", "change", "shown"),
    [
        # In the logits of every token.
        (
            "model.layers.1.self_attn.v_proj.weight",
            1.0,
            r"1 weights differ .*layers.1.self_attn.v_proj.*; logits differ",
        ),
        # The row of a token that the compared sequences do not have: only the comparison of the weights can see it.
        ("model.embed_tokens.weight", 1e-6, r"1 weights differ .* embed_tokens.weight$"),
    ],
)
def test_a_tampered_weight_is_not_published(
    name: str, change: float, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(monkeypatch, name, change)
    with pytest.raises(ExportMismatchError, match=shown):
        export(MODELS["qwen3"], random_weights(MODELS["qwen3"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_network_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = export_module.hf_config

    def other_theta(config: ModelConfig, *arguments: Any) -> Any:
        return original(config.model_copy(update={"rope_theta": 500.0}), *arguments)

    monkeypatch.setattr(export_module, "hf_config", other_theta)
    with pytest.raises(
        ExportMismatchError, match=r"^the export does not match its checkpoint: logits differ by"
    ) as error:
        export(MODELS["llama tied"], random_weights(MODELS["llama tied"]), tmp_path / "out")
    assert not error.value.report.check.differing_weights
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_not_published(
    tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train_other(tmp_path / "other.model")
    convert = export_module.convert_tokenizer
    monkeypatch.setattr(export_module, "convert_tokenizer", lambda _, length: convert(other, length))
    with pytest.raises(ExportMismatchError, match=r"the tokenizers disagree on \d of \d texts"):
        export(MODELS["qwen3"], random_weights(MODELS["qwen3"]), tmp_path / "out", tokenizer_file)
    assert list(tmp_path.iterdir()) == [other]


def test_missing_and_unexpected_names_are_refused(tmp_path: Path) -> None:
    weights = random_weights(MODELS["qwen3"])
    weights["layers.3.mlp.up_proj.weight"] = weights.pop("layers.2.mlp.up_proj.weight")
    with pytest.raises(
        UserError, match=r"qwen3 .*1 missing \(layers.2.mlp.up_proj.weight\) and 1 unexpected \(layers.3.mlp.up_proj.w"
    ):
        export(MODELS["qwen3"], weights, tmp_path / "out")
    # Another architecture's weights: head norms that llama has not.
    with pytest.raises(UserError, match=r"llama .*: 6 unexpected \(layers.0.self_attn.q_norm.weight, .*, \.\.\.\)"):
        export(tiny("llama"), random_weights(MODELS["qwen3"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_wrong_shapes_and_diverged_weights_are_refused(tmp_path: Path) -> None:
    weights = random_weights(MODELS["qwen3"])
    with pytest.raises(UserError, match=r"weight embed_tokens.weight has shape \[704, 48\], .* makes it \[768, 48\]"):
        export(tiny("qwen3", vocab_size=768), weights, tmp_path / "out")
    weights["norm.weight"][3] = float("nan")
    with pytest.raises(UserError, match=r"weight norm.weight holds NaN"):
        export(MODELS["qwen3"], weights, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_too_large_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    config = tiny("qwen3", vocab_size=512)
    with pytest.raises(UserError, match=r"tokenizer.model has 700 tokens, but the model's vocab_size is 512"):
        export(config, random_weights(config), tmp_path / "out", tokenizer_file)


@pytest.mark.parametrize(
    ("routing", "shown"),
    [
        (RoutingConfig(policy="cla", group_size=2), "policy cla with its fixed groups cannot run at full retention"),
        (RoutingConfig(policy="strategy", cross_layer_prob=1.0), "policy strategy with cross_layer_prob 1.0 cannot"),
        (
            RoutingConfig(policy="uniform", cross_layer_prob=Schedule(points=[[0.5, 1.0]])),
            "policy uniform with cross_layer_prob 1.0 at 0.5 of the run cannot",
        ),
    ],
)
def test_a_model_that_never_ran_at_full_retention_is_refused(
    routing: RoutingConfig, shown: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=shown):
        export(MODELS["qwen3"], random_weights(MODELS["qwen3"]), tmp_path / "out", training=Training(routing, {}))


def test_a_model_that_ran_at_full_retention_at_times_is_exported(tmp_path: Path) -> None:
    """In some micro-batches, or before its rate had risen to 1; the export says how."""
    rise = Schedule(points=[[0.0, 0.0], [0.5, 1.0]])
    for name, rates in (
        ("some", {"cross_layer_prob": 1.0, "full_retention_share": 0.5}),
        ("rise", {"cross_layer_prob": rise}),
    ):
        routing = RoutingConfig.model_validate({"policy": "strategy", **rates})
        out = tmp_path / name
        export(MODELS["qwen3"], random_weights(MODELS["qwen3"]), out, training=Training(routing, {}))
    card, stored = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
    assert "| cross_layer_prob | 0.0 at 0.0 to 1.0 at 0.5 of the run |" in " ".join(card.split())
    assert stored["kv_training"] == {"policy": "strategy", "cross_layer_prob": {"points": [[0.0, 0.0], [0.5, 1.0]]}}
    assert "| full_retention_share | 0.5" in " ".join((tmp_path / "some/README.md").read_text().split())


def test_standard_training_is_not_called_routed(tmp_path: Path) -> None:
    training = Training(RoutingConfig(policy="none"), {})
    export(MODELS["qwen3"], random_weights(MODELS["qwen3"]), tmp_path / "out", training=training)
    assert "trained without stochastic KV routing" in (tmp_path / "out/README.md").read_text()


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    weights = random_weights(MODELS["mistral"])
    (tmp_path / "empty").mkdir()
    export(MODELS["mistral"], weights, tmp_path / "empty")
    for output in (tmp_path / "empty", tmp_path / "empty/config.json"):
        with pytest.raises(UserError, match=f"output {output} exists and is not an empty folder; choose another"):
            export(MODELS["mistral"], weights, output)


@pytest.fixture
def run(tokenizer_file: Path, tmp_path: Path) -> Path:
    """The folder of a run with the checkpoint of a bfloat16 training, and its retention curve."""
    config = MODELS["llama tied"]
    weights = random_weights(config)
    partial = tmp_path / "run/checkpoints" / partial_folder(40)
    whole = {WEIGHTS + name: [Piece(tuple(w.shape), (0,) * w.dim(), w)] for name, w in weights.items()}
    write_pieces(partial, whole)
    tree = {
        "model": config.model_dump(),
        "routing": {"policy": "strategy", "cross_layer_prob": 0.25},
        "data": {"sequence_length": 192},
        "train": {"precision": "bf16"},
    }
    facts = Facts(step=40, tokens_seen=12345)
    write_facts(
        partial, config_text=yaml.safe_dump(tree), facts=facts, files={"tokenizer.model": tokenizer_file.read_bytes()}
    )
    folder = partial.with_name(step_folder(40))
    publish(partial, folder, {})
    points = [RetentionPoint("full", 3, 1.0, 384, 2.371), RetentionPoint("prefix:1", 1, 1 / 3, 128, 2.402)]
    nan = float("nan")  # which JSON has not
    points.append(RetentionPoint("every:2", 2, 2 / 3, 256, nan, Interval(nan, nan, nan)))
    (folder / "retention.json").write_text(as_json({"sequences": 64, "points": as_records(points)}))
    return tmp_path / "run"


def export_command(*arguments: str | Path) -> int:
    """Run tools/export_hf.py; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["export_hf.py", *map(str, arguments)])
        runpy.run_path(str(Path(__file__).parents[2] / "tools/export_hf.py"), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, figures = tmp_path / "exports/out", tmp_path / "figures.json"
    assert export_command(run, out, "--json", figures) == 0
    assert re.search(r"\| tokenizer +\| (\d) of \1 texts agree", capsys.readouterr().out)
    found = json.loads(figures.read_text())
    assert found["failures"] == []
    assert found["dtype"] == "bfloat16"
    assert found["parameters"] == sum(tensor.numel() for tensor in random_weights(MODELS["llama tied"]).values())
    card = (out / "README.md").read_text()
    for fact in ("policy `strategy`", "| tokens_seen      | 12345 ", "| sequence_length  | 192 ", "+0.0310 |"):
        assert fact in card, fact

    assert export_command(run, out) == 2
    assert f"error: output {out} exists and is not an empty folder" in capsys.readouterr().err
    assert export_command(tmp_path / "nothing", tmp_path / "other") == 2
    assert export_command(run, tmp_path / "model", "--without-tokenizer", "--dtype", "float32") == 0
    assert not (tmp_path / "model/tokenizer.json").exists()
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.float32


def test_command_with_profiles_and_pruning(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_command(run, tmp_path / "out", "--profile", "bulk=every:3", "--profile", "start=prefix:1") == 0
    assert "at full, every:2, prefix:2" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out/config.json").read_text())
    assert stored["kv_profiles"] == {"bulk": "every:3", "start": "prefix:1"}
    assert (stored["kv_training"]["policy"], stored["kv_training"]["cross_layer_prob"]) == ("strategy", 0.25)
    assert "+0.0310" in stored["kv_training"]["retention_table"]
    card = (tmp_path / "out/README.md").read_text()
    assert "* `bulk`: every:3" in card and 'kv_profile="bulk"' in card
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", kv_profile="bulk").retained_layers == (0,)

    pruned = ("--prune", "0,2", "--without-tokenizer")
    assert export_command(run, tmp_path / "pruned", *pruned, "--profile", "start=0") == 0
    assert "at layers 0,2" in capsys.readouterr().out
    assert json.loads((tmp_path / "pruned/config.json").read_text())["kv_profiles"] == {"start": "0"}
    assert export_command(run, tmp_path / "other", *pruned, "--profile", "two=0,1") == 2
    assert "--profile two=0,1 retains layers that --prune leaves out, which keeps [0, 2]" in capsys.readouterr().err
    assert export_command(run, tmp_path / "other", "--profile", "bulk") == 2
    assert "--profile bulk= must look like NAME=STRATEGY, such as half=every:2" in capsys.readouterr().err
    assert export_command(run, tmp_path / "other", "--profile", "bulk=0,7") == 2
    assert "retains layer 7, but the model has layers 0 to 2" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


ALONE = """
import json, pickle, sys, torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
whole, pruned = sys.argv[1:]
tokens = torch.arange(40)[None] * 7
plain = AutoModelForCausalLM.from_pretrained(whole)
assert type(plain) is LlamaForCausalLM
routed = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True, kv_profile="two")
assert isinstance(routed, LlamaForCausalLM) and routed.retained_layers == (0, 2)
small = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
full = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(plain(tokens).logits, full(tokens).logits)
    assert torch.equal(routed(tokens).logits, small(tokens).logits)
    small.set_cache_strategy([0])
    routed.set_cache_strategy("prefix:1")
    assert torch.equal(routed(tokens).logits, small(tokens).logits)
small.set_cache_strategy([0, 2])
routed.set_cache_strategy("two")
try:
    small.set_cache_strategy("full")
except ValueError as error:
    print(error)
try:
    AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=False)
except ValueError as error:
    print(error)
for model, folder in ((routed, "third"), (small, "fourth")):
    model.save_pretrained(folder)
    assert pickle.loads(pickle.dumps(model)).retained_layers == (0, 2)
for folder in ("again", "third", "pruned again", "fourth"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(routed(tokens).logits, model(tokens).logits)
    stored = json.load(open(f"{folder}/config.json"))
    assert stored["architectures"] == ["PrunedLlamaForCausalLM" if "pruned" in folder or folder == "fourth" else
        "LlamaForCausalLM"]
    assert "kv_profile" not in json.load(open(f"{folder}/generation_config.json"))
assert type(AutoModelForCausalLM.from_pretrained("third")) is LlamaForCausalLM
try:
    AutoModelForCausalLM.from_pretrained("third", kv_profile="two")  # trust_remote_code was forgotten
    raise AssertionError("a profile was passed over")
except TypeError as error:
    assert "kv_profile" in str(error)
print(small.num_parameters(), plain.num_parameters())
assert not [name for name in sys.modules if name.startswith("skvr_dist")]
"""


def test_an_export_brings_its_code_along(tmp_path: Path) -> None:
    """In a process without our package: plain, at a profile, and pruned; also once they are saved again."""
    config, weights = MODELS["llama biased"], random_weights(MODELS["llama biased"])
    strategy = CacheStrategy(3, (0, 2))
    training = Training(TRAINING.routing, {}, profiles={"two": "0,2"})
    export(config, weights, tmp_path / "whole", training=training)
    report = export(config, weights, tmp_path / "pruned", training=training, pruned_to=strategy)
    unused = [w for name, w in weights.items() if name.startswith(("layers.1.self_attn.k", "layers.1.self_attn.v"))]
    assert len(unused) == 4  # weights and biases
    assert report.parameters == sum(w.numel() for w in weights.values()) - sum(w.numel() for w in unused)

    for folder, options in {"whole": {"kv_profile": "two"}, "pruned": {}}.items():
        again = tmp_path / ("again" if folder == "whole" else "pruned again")
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, **options).save_pretrained(again)
    with pytest.raises(UserError, match=r"layer 1 was pruned from this checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", kv_profile="full")
    with pytest.raises(UserError, match=r"layer 1 was pruned from this checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", kv_source_layers=[0, 1, 1])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "whole", tmp_path / "pruned"],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "layer 1 was pruned from this checkpoint and cannot keep a cache; retain some of layers [0, 2]" in done.stdout
    )
    assert "trust_remote_code=True" in done.stdout
    assert done.stdout.split()[-2:] == [str(report.parameters), str(sum(w.numel() for w in weights.values()))]


def test_pruning_serves_fixed_groups(tmp_path: Path) -> None:
    """A policy that never ran at full retention can be exported for the strategy that it did run at."""
    training = Training(RoutingConfig(policy="cla", group_size=2), {})
    strategy = CacheStrategy.every(2, 3)
    config = MODELS["qwen3"]
    export(config, random_weights(config), tmp_path / "out", training=training, pruned_to=strategy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.retained_layers == (0, 2)
    assert "This export is **pruned**: layers 0, 2 of 3 keep" in (tmp_path / "out/README.md").read_text()


def test_command_with_a_tampered_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(monkeypatch, "model.norm.weight", 1.0)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert export_command(run, out, "--json", figures) == 1
    shown = capsys.readouterr()
    assert "the export does not match its checkpoint: 1 weights differ" in shown.err
    assert f"{out} was not written" in shown.err
    assert "| differing weights        | 1 " in shown.out
    assert len(json.loads(figures.read_text())["failures"]) == 2
    assert not list(tmp_path.glob("out*"))
