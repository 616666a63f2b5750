"""GGUF files: their weights dequantized, their metadata as our configuration, their tokenizer as files."""

from __future__ import annotations

import re
import shutil
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.gguf_models import (
    CHAT_TEMPLATE,
    LLAMA3,
    MODELS,
    TOKENIZER,
    VOCABULARY,
    byte_level_tokenizer,
    write,
    write_gguf,
)
from support.hf_models import export_checkpoint, random_weights
from support.tokenizers import TEXT
from transformers import AutoTokenizer

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.import_model import ImportReport, import_model


def imported(folder: Path, config: ModelConfig, **more: Any) -> ImportReport:
    write(folder / "model.gguf", config, **more)
    return import_model(str(folder / "model.gguf"), folder / "ours")


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_weight_is_the_dequantized_one(config: ModelConfig, tmp_path: Path) -> None:
    """As the package gguf dequantizes it, rows back in their order; and as transformers loads the file."""
    wanted = write(tmp_path / "model.gguf", config)
    report = import_model(str(tmp_path / "model.gguf"), tmp_path / "ours")
    assert report.check is not None and report.failures() == []
    assert report.dequantized_from is not None
    assert set(report.dequantized_from.split(", ")) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q8_0"}
    assert report.dtypes == ("bfloat16", "float16", "float32")
    checkpoint = Checkpoint(tmp_path / "ours")
    assert checkpoint.model_config == config
    assert checkpoint.facts.dequantized_from == report.dequantized_from
    assert sorted(checkpoint.weight_names()) == sorted(wanted)
    for name, values in wanted.items():
        assert torch.equal(checkpoint.weight(name).float(), torch.from_numpy(values.astype(np.float32))), name
    assert checkpoint.weight_dtype("layers.0.mlp.gate_proj.weight") == torch.bfloat16
    assert checkpoint.weight_dtype("layers.0.mlp.up_proj.weight") == torch.float16


def test_the_card_tells_what_the_weights_were(tmp_path: Path) -> None:
    report = imported(tmp_path, MODELS["qwen3"])
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    card = (tmp_path / "again/README.md").read_text()
    assert f"Its weights were dequantized from {report.dequantized_from}: they have no more precision" in card
    assert re.search(rf"\| dequantized_from +\| {report.dequantized_from} +\|", card)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    """With its ids, special tokens and chat template; made of the file, or the one beside it if it is the same."""
    report = imported(tmp_path, MODELS["llama"])
    assert report.tokenizer == "made by transformers, with its chat template"
    found = AutoTokenizer.from_pretrained(Checkpoint(tmp_path / "ours").folder)
    assert found(TEXT)["input_ids"] == TOKENIZER.encode(TEXT).ids
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<|im_start|>", "<|im_end|>", CHAT_TEMPLATE)

    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert import_model(str(tmp_path / "model.gguf"), tmp_path / "beside").tokenizer == "the files beside it"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (Checkpoint(tmp_path / "beside").folder / name).read_bytes() == (tmp_path / name).read_bytes()

    write(tmp_path / "model.gguf", MODELS["llama"], split="smollm")
    byte_level_tokenizer([TEXT.upper()], VOCABULARY).save(str(tmp_path / "tokenizer.json"))
    other = import_model(str(tmp_path / "model.gguf"), tmp_path / "other", check=False)
    assert other.tokenizer.startswith("made by transformers, with its chat template; it splits texts as GPT-2 did, ")
    assert "the original as smollm does: some texts get other ids" in other.tokenizer


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    config = MODELS["qwen3"]
    write_gguf(tmp_path / "model.gguf", config, random_weights(config), {})
    report = import_model(str(tmp_path / "model.gguf"), tmp_path / "ours")
    assert report.tokenizer.startswith("none, for ") and report.dequantized_from is None
    assert Checkpoint(tmp_path / "ours").tokenizer_file is None


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "model.gguf", MODELS["llama"])
    dequantize = gguf.dequantize
    handed_out: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(reference() is not None for reference in handed_out))
        values = dequantize(*arguments)
        handed_out.append(weakref.ref(values))
        return values

    monkeypatch.setattr(gguf, "dequantize", watched)
    import_model(str(tmp_path / "model.gguf"), tmp_path / "ours", check=False)
    assert len(alive) == len(Checkpoint(tmp_path / "ours").weight_names()) and max(alive) <= 1


def write_half(file: Path) -> None:
    write(file, MODELS["llama"])
    file.write_bytes(file.read_bytes()[:-5000])


def other_architecture(file: Path) -> None:
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def one_part(file: Path) -> None:
    """As llama.cpp cuts large models: the first part has the metadata, and some of the tensors."""
    parts = partial(gguf.GGUFWriter, split_max_tensors=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", parts)
        write(file, MODELS["llama"])
    min(file.parent.glob("model-00001-of-*.gguf")).rename(file)


def other_rope_table(file: Path) -> None:
    config = MODELS["llama"].model_copy(
        update={"rope_scaling": LLAMA3.model_copy(update={"original_max_position_embeddings": 500})}
    )
    write(file, config)


def one_tensor_less(file: Path) -> None:
    weights = random_weights(MODELS["qwen3"])
    del weights["layers.1.self_attn.q_norm.weight"]
    write_gguf(file, MODELS["qwen3"], weights, {})


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no GGUF": (lambda f: f.write_bytes(b"nothing" * 100), r"model.gguf is not a whole GGUF file \(.*\); download it"),
    "not there": (lambda f: None, r"model.gguf is not a whole GGUF file \(.*No such file.*\); download it again"),
    "truncated": (write_half, r"model.gguf is not a whole GGUF file \("),
    "architecture": (other_architecture, r"is of architecture gpt2, but only llama, qwen2 and qwen3 can be imported"),
    "yarn": (
        lambda f: write(f, MODELS["qwen3"], rope__scaling__type="yarn", rope__scaling__factor=4),
        r"has qwen3.rope.scaling.type yarn and qwen3.rope.scaling.factor 4, which our decoder has not; choose another",
    ),
    "experts": (lambda f: write(f, MODELS["llama"], expert_count=8), r"has llama.expert_count 8, which our decoder"),
    "part": (one_part, r"model.gguf is one of \d+ parts of a model; join them with `llama-gguf-split --merge` of"),
    "rope table": (other_rope_table, r"by a table \(rope_freqs.weight\) that is not Llama 3's; import the original"),
    "missing tensor": (one_tensor_less, r"1 missing \(layers.1.self_attn.q_norm.weight\); download .*model.gguf again"),
}


@pytest.mark.parametrize(("make", "shown"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_imported(make: Callable[[Path], Any], shown: str, tmp_path: Path) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=shown):
        import_model(str(tmp_path / "model.gguf"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_says_nothing_is_no_obstacle(tmp_path: Path) -> None:
    assert imported(tmp_path, MODELS["llama"], rope__scaling__type="none", expert_count=0).failures() == []


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"model.gguf needs the package gguf .* pip install 'skvr-dist\[gguf\]'$"):
        import_model(str(tmp_path / "model.gguf"), tmp_path / "ours")


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    write(tmp_path / "theirs.gguf", MODELS["qwen3"])
    shutil.copy(tmp_path / "theirs.gguf", tmp_path / "zweite.gguf")
    with pytest.raises(UserError, match=r"holds GGUF files; name the one to import, such as .*/theirs.gguf$"):
        import_model(str(tmp_path), tmp_path / "ours")
