"""Hugging Face -> ours -> Hugging Face: the same bits, and a checkpoint that training resumes from."""

from __future__ import annotations

import json
import runpy
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hf_models import edit_config, edit_weights, published, random_weights, shape_of, stored
from support.tokenizers import train_ours
from support.trainers import start_from_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, MistralConfig

import skvr_dist.hf.convert.source_folder as source_module
from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import export_model
from skvr_dist.hf.convert.import_model import ImportMismatchError, import_model
from skvr_dist.hf.convert.source_folder import SourceFolder
from skvr_dist.hf.convert.tokenizer import convert_tokenizer
from skvr_dist.lab.verify import reference
from skvr_dist.lab.verify.cases import CLIP, LAYOUTS, OPTIMIZER, Case, batches
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.model.decoder import next_token_loss
from skvr_dist.train.plans import plan_of_step

LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
MODELS = {
    "qwen3": shape_of("qwen3"),
    "qwen3 tied, biased": shape_of("qwen3", tie_word_embeddings=True, attention_bias=True),
    "llama": shape_of("llama", rope_scaling=LLAMA3),
    "llama tied": shape_of("llama", tie_word_embeddings=True, rope_scaling=RopeScaling(rope_type="linear", factor=2.0)),
    "qwen2": shape_of("qwen2"),
    "qwen2 tied": shape_of("qwen2", tie_word_embeddings=True, rope_scaling=LLAMA3),
    "mistral": shape_of("mistral"),
    "mistral tied": shape_of("mistral", tie_word_embeddings=True, num_key_value_heads=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_round_trip(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    published(config, tmp_path / "theirs", dtype, max_shard_size="40KB")  # many files
    report = import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert report.tokenizer == "none; generation_config.json as it is"
    assert report.check is not None and report.failures() == []
    assert report.check.strategies == ("full", "every:2", "prefix:4")
    assert report.dtypes == (str(dtype).removeprefix("torch."),)
    checkpoint = Checkpoint(tmp_path / "ours")
    assert checkpoint.model_config == config
    export_model(
        checkpoint.model_config,
        checkpoint.weight_names(),
        checkpoint.weight,
        None,
        tmp_path / "again",
        training=Training.of(checkpoint),
        dtype=dtype,
    )
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == dtype for name in before)
    tokens = torch.randint(1, 101, (2, 200), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted, found = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits
            for name in ("theirs", "again")
        )
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_few_weights_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(MODELS["qwen3"], tmp_path / "theirs")
    read, handed_out, alive = SourceFolder.read, [], []

    def watched(weights: Any, name: str) -> Tensor:
        tensor = read(weights, name)
        handed_out.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in handed_out))
        return tensor

    monkeypatch.setattr(SourceFolder, "read", watched)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", check=False)
    assert len(alive) > 90 and max(alive) <= 2


def test_several_dtypes_stay_what_they_are(tmp_path: Path) -> None:
    published(MODELS["llama tied"], tmp_path / "theirs")
    edit_weights(lambda w: w.update({name: w[name].bfloat16() for name in w if "norm" in name}))(tmp_path / "theirs")
    assert run_tool("import_hf.py", tmp_path / "theirs", tmp_path / "ours") == 0
    assert run_tool("export_hf.py", tmp_path / "ours", tmp_path / "again") == 0
    before, after = stored(tmp_path / "theirs"), stored(tmp_path / "again")
    assert {tensor.dtype for tensor in before.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "float32"


def test_training_goes_on(tmp_path: Path) -> None:
    """A step on the imported weights, with donors, has the reference's gradients."""
    config = MODELS["llama tied"]
    config = config.model_copy(
        update={"rope_scaling": None}
    )  # with it, weights this large round further than the bound
    published(config, tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    decoder = Checkpoint(tmp_path / "ours").load_decoder().train()
    tokens = torch.randint(1, 101, (2, 13), generator=torch.Generator().manual_seed(5))
    donors = [0, 0, 2, 0, 4, 2, 5, 7]
    next_token_loss(decoder(tokens[:, :-1], donors), tokens[:, 1:]).backward()
    weights = {name: w.requires_grad_() for name, w in random_weights(config).items()}
    reference.loss(weights, config.model_dump(), tokens, donors).backward()
    for name, parameter in decoder.named_parameters():
        wanted = weights[name].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        assert parameter.grad is not None
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2xDP2 ZeRO-3"])
def test_training_goes_on_in_any_layout(tmp_path: Path, layout: str) -> None:
    case = Case(layout, tied=True)
    config = ModelConfig.model_validate(case.shape)
    published(config, tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    plans = [plan_of_step(case.config(), step).donors.tolist() for step in range(2)]
    wanted = reference.train(random_weights(config), case.shape, batches(2), plans, clip=CLIP, optimizer=OPTIMIZER)[
        "losses"
    ]
    for losses in run_ranks(LAYOUTS[layout].ranks, start_from_weights, case, str(tmp_path / "ours")):
        assert losses == pytest.approx(wanted, rel=1e-6)


def test_tokenizer_files_travel(tmp_path: Path) -> None:
    """There and back, by the commands, with the settings of generation and a chat template."""
    theirs = tmp_path / "theirs"
    published(shape_of("qwen3", vocab_size=704), theirs)
    tokenizer = convert_tokenizer(train_ours(tmp_path / "tokenizer.model"), 256)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(theirs)
    GenerationConfig(eos_token_id=[2, 7], temperature=0.6, do_sample=True).save_pretrained(theirs)
    assert run_tool("import_hf.py", theirs, tmp_path / "ours") == 0
    assert run_tool("export_hf.py", tmp_path / "ours", tmp_path / "again") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (theirs / name).read_bytes(), name
    assert "that of the checkpoint that was imported" in (tmp_path / "again/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (2, [2, 7])


def test_old_spellings(tmp_path: Path) -> None:
    """transformers 4's RoPE keys, stored frequencies, and a head stored beside the embedding it is tied to."""
    config = MODELS["llama tied"].model_copy(update={"rope_scaling": LLAMA3})
    published(config, tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    tree = json.loads(file.read_text())
    rope = tree.pop("rope_parameters")
    tree["rope_theta"], tree["rope_scaling"] = rope.pop("rope_theta"), rope
    file.write_text(json.dumps(tree))
    weights = stored(tmp_path / "theirs")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert Checkpoint(tmp_path / "ours").model_config == config


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    published(MODELS["llama tied"], folder)
    return folder


UP, NORM = "model.layers.3.mlp.up_proj.weight", "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        edit_config(model_type="gpt2"),
        r"model_type gpt2, but only qwen3, qwen2, llama, mistral can be imported",
    ),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), r"cannot read .*/config.json \("),
    "null": (lambda f: (f / "config.json").write_text("null"), r"cannot read .*/config.json \("),
    "heads": (
        edit_config(num_key_value_heads=3),
        r"llama model: num_attention_heads 4 must be a multiple of num_key_value_heads 3; use the config.json that",
    ),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"is quantized and cannot be"),
    "activation": (
        edit_config(hidden_act="gelu"),
        r"has hidden_act gelu, which our decoder has not; choose another checkpoint$",
    ),
    "mlp bias": (
        edit_config(mlp_bias=True),
        r"has mlp_bias True, which our decoder has not; choose another checkpoint$",
    ),
    "rope": (
        edit_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        r"has rope_type yarn, which our decoder has not",
    ),
    "missing tensor": (
        edit_weights(lambda w: w.pop(UP)),
        r"llama .*: 1 missing \(layers.3.mlp.up_proj.weight\); download",
    ),
    "other tensor": (
        edit_weights(lambda w: w.update(extra=torch.ones(1))),
        r"1 unexpected \(\(extra\)\); download .* again or give another",
    ),
    "shape": (
        edit_weights(lambda w: w.update({NORM: torch.ones(16)})),
        r"^weight model.norm.weight has shape \[16\], but config.json makes it \[32\]; use the config.json that",
    ),
    "dtype": (
        edit_weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)})),
        r"^weight model.norm.weight is stored as torch.int8, which cannot be trained; import the original in bf16 or",
    ),
    "untied head": (
        edit_weights(lambda w: w.update({"lm_head.weight": torch.ones(101, 32)})),
        r"tie_word_embeddings true, but its lm_head.weight is not its embedding; set it to false",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), r"holds no safetensors files; convert"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        r"model.safetensors are missing or damaged .*; download them again",
    ),
    "number in quotes": (edit_config(hidden_size="32"), r"cannot read .*/config.json \(.*hidden_size"),
    "no heads": (edit_config(num_attention_heads=0, head_dim=None), r"cannot read .*/config.json \("),
}


@pytest.mark.parametrize(("breaks", "shown"), BROKEN.values(), ids=BROKEN)
def test_broken_sources(breaks: Callable[[Path], Any], shown: str, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "theirs")
    breaks(tmp_path / "theirs")
    with pytest.raises(UserError, match=shown):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"]


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    published(MODELS["mistral"], tmp_path / "theirs")
    assert MistralConfig().sliding_window == 4096
    edit_config(sliding_window=4096)(tmp_path / "theirs")
    with pytest.raises(
        UserError, match=r"has sliding_window 4096, which our decoder has not; .* change its config.json"
    ):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")


def test_what_a_qwen2_may_have_and_what_not(tmp_path: Path) -> None:
    """Published ones name a window that they do not use, and no head size."""
    published(MODELS["qwen2"], tmp_path / "theirs")
    edit_config(use_sliding_window=False, sliding_window=32768)(tmp_path / "theirs")
    assert "head_dim" not in json.loads((tmp_path / "theirs/config.json").read_text())
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", check=False)
    assert Checkpoint(tmp_path / "ours").model_config == MODELS["qwen2"]
    for edit, shown in (
        (edit_config(use_sliding_window=True), r"has sliding_window 32768, which our decoder has not"),
        (
            edit_config(use_sliding_window=False, dual_chunk_attention_config={"chunk_size": 64}),
            r"has dual_chunk_attention_config \{'chunk_size': 64\}, which our decoder has not",
        ),
        (
            edit_config(dual_chunk_attention_config=None, head_dim=16),
            r"head_dim 16 times num_attention_heads 4 must be hidden_size 32: configurations of qwen2 have no head",
        ),
    ):
        edit(tmp_path / "theirs")
        with pytest.raises(UserError, match=shown):
            import_model(str(tmp_path / "theirs"), tmp_path / "again")


def test_what_is_not_the_same_is_not_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = source_module.model_config
    monkeypatch.setattr(
        source_module, "model_config", lambda theirs: original(theirs).model_copy(update={"rope_theta": 500.0})
    )
    with pytest.raises(ImportMismatchError, match=r"^the import does not match its source: logits differ by"):
        import_model(str(source), tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def run_tool(name: str, *arguments: str | Path) -> int:
    """Run a tool; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(Path(__file__).parents[2] / "tools" / name), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


def test_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("import_hf.py", source, tmp_path / "ours", "--json", tmp_path / "figures.json") == 0
    assert "at full, every:2, prefix:4" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["failures"] == []
    assert run_tool("import_hf.py", source, tmp_path / "unchecked", "--without-check") == 0
    assert "logit" not in capsys.readouterr().out
    weights = Checkpoint(tmp_path / "unchecked").weight
    assert all(torch.equal(weights(name.removeprefix("model.")), tensor) for name, tensor in stored(source).items())
    assert run_tool("import_hf.py", source, tmp_path / "ours") == 2
    assert f"error: output {tmp_path / 'ours'} exists and is not an empty folder" in capsys.readouterr().err
    assert run_tool("import_hf.py", tmp_path / "nothing", tmp_path / "other") == 2
    assert "is neither a folder here nor a repository of the Hub" in capsys.readouterr().err
