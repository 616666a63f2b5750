"""Folders of checkpoints as they lie about: imported with the weights that transformers loads, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hf_models import edit_config, edit_weights, published, shape_of, stored
from torch import Tensor
from transformers import AutoModelForCausalLM

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.hf.convert.weight_files import require_same_for_vllm

CONFIG = shape_of("llama", num_hidden_layers=2)
TIED = CONFIG.model_copy(update={"tie_word_embeddings": True})
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: one file; several with an index; one file, tied."""
    folder = tmp_path_factory.mktemp("sources")
    published(CONFIG, folder / "single")
    published(CONFIG, folder / "sharded", max_shard_size="20KB")
    published(TIED, folder / "tied")
    return folder


def add_old_shards(folder: Path) -> None:
    """Other weights and their index, as an earlier save leaves them."""
    old = {name: tensor + 1 for name, tensor in stored(folder).items()}
    save_file(old, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def add_consolidated(folder: Path) -> None:
    save_file({"layers.0.attention.wq.weight": torch.ones(3)}, folder / "consolidated.safetensors")


def name_other_file(folder: Path) -> None:
    other = {name: tensor + 1 for name, tensor in stored(folder).items()}
    save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
    edit_config(transformers_weights="other.safetensors")(folder)


def link_as_the_cache_does(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    folder.rename(blobs)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(Path("..") / "blobs" / file.name)


def link_to_nothing(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("nowhere")


def head_alone(weights: dict[str, Tensor]) -> None:
    weights[HEAD] = weights.pop(EMBEDDING)


WHOLE: dict[str, tuple[str, Edit]] = {
    "old index beside a new file": ("single", add_old_shards),
    "consolidated beside a file": ("single", add_consolidated),
    "consolidated beside shards": ("sharded", add_consolidated),
    "file named by config.json": ("single", name_other_file),
    "links into the Hub's cache": ("sharded", link_as_the_cache_does),
    "tied, head alone": ("tied", edit_weights(head_alone)),
    "frequencies": ("single", edit_weights(lambda w: w.update({"model.rotary_emb.inv_freq": torch.ones(4)}))),
    "other name of silu": ("single", edit_config(hidden_act="swish")),
    "dtype as torch writes it": ("single", edit_config(dtype="torch.bfloat16")),
    "no head_dim": ("single", edit_config(head_dim=None)),
    "zeros": ("single", edit_weights(lambda w: w.update({name: w[name] * 0 for name in w}))),
}


@pytest.mark.parametrize(("base", "edit"), WHOLE.values(), ids=WHOLE)
def test_the_weights_are_those_that_transformers_loads(base: str, edit: Edit, sources: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(sources / base, theirs)
    edit(theirs)
    import_model(str(theirs), tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).state_dict()
    ours = Checkpoint(tmp_path / "ours")
    assert all(
        torch.equal(ours.weight(name), loaded[name if name == HEAD else f"model.{name}"])
        for name in ours.weight_names()
    )


def write(name: str, content: str | bytes) -> Edit:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def rename(name: str) -> Edit:
    return lambda folder: (folder / SINGLE).rename(folder / name)


def set_values(name: str, value: float, count: int) -> Edit:
    return edit_weights(lambda weights: weights[name].view(-1)[:count].fill_(value))


def make_hub_folder(folder: Path) -> None:
    inside = folder.rename(folder.with_name("inside"))
    (folder / "snapshots").mkdir(parents=True)
    inside.rename(folder / "snapshots" / "abc")


BROKEN: dict[str, tuple[str, Edit, str]] = {
    "NaN": ("single", set_values(NORM, float("nan"), 3), r"^weight model.norm.weight holds 3 NaN or infinite values "),
    "infinite": ("tied", set_values(EMBEDDING, float("-inf"), 1), r"^weight model.embed_tokens.weight holds 1 NaN or "),
    "tied by mistake": (
        "single",
        edit_weights(lambda w: w.pop(HEAD)),
        r"1 missing \(lm_head.weight\); set tie_word_embeddings to true in config.json if",
    ),
    "theta null": (
        "single",
        edit_config(rope_parameters=None, rope_theta=None),
        r"rope_theta: Input should be a",
    ),
    "theta in quotes": ("single", edit_config(rope_parameters={"rope_theta": "1e4"}), r"rope_theta: Input should be a"),
    "layer types": (
        "single",
        edit_config(layer_types=["linear_attention"] * 2),
        r"has layer type linear_attention",
    ),
    "byte-order mark": (
        "single",
        lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes()),
        r"cannot read .*/config.json \(it begins with a byte-order mark, .*\); correct it or download it again",
    ),
    "UTF-16": (
        "single",
        lambda f: write("config.json", "{}".encode("utf-16"))(f),
        r"cannot read .*/config.json \('utf-8",
    ),
    "list": ("single", write("config.json", "[1]"), r"cannot read .*/config.json \(it holds a list, not an object\)"),
    "deep": ("single", write("config.json", "[" * 100_000), r"cannot read .*/config.json \(maximum recursion depth"),
    "NaN in config.json": ("single", edit_config(rms_norm_eps=float("nan")), r"rms_norm_eps: Input should be a finite"),
    "quantized, in words": ("single", edit_config(quantization_config="int4"), r"^the checkpoint is quantized and"),
    "index that is no JSON": ("sharded", write(INDEX, "{"), r"index.json is damaged \(JSONDecodeError"),
    "index of nothing": ("sharded", write(INDEX, '{"weight_map": {}}'), r"index.json is damaged .*names no file"),
    "index of numbers": (
        "sharded",
        write(INDEX, '{"weight_map": {"a": 5}}'),
        r"index.json is damaged .*it has no w",
    ),
    "index in a list": ("sharded", write(INDEX, "[]"), r"index.json is damaged .*it has no weight_map"),
    "index without metadata": (
        "sharded",
        lambda f: write(INDEX, json.dumps({"weight_map": json.loads((f / INDEX).read_text())["weight_map"]}))(f),
        r"^transformers cannot load .* \(KeyError: 'metadata'\); correct it or download it again",
    ),
    "shard missing": (
        "sharded",
        lambda f: max(f.glob("model-*")).unlink(),
        r"^weights .*/model-\d+-of-\d+.safetensors are missing or damaged \(No such file or directory\); download them",
    ),
    "shard cut short": (
        "sharded",
        lambda f: max(f.glob("model-*")).write_bytes(b"1234567"),
        r"^weights .*/model-\d+-of-\d+.safetensors are missing or damaged \(Error while deserializing header",
    ),
    "pointer": (
        "single",
        write(SINGLE, "version https://git-lfs.github.com/spec/v1\n"),
        r"\(it is a pointer of Git LFS",
    ),
    "dangling link": (
        "single",
        link_to_nothing,
        r"^weights .*/model.safetensors are missing or damaged \(No such file or directory\)",
    ),
    "consolidated alone": (
        "single",
        rename("consolidated.safetensors"),
        r"holds neither model.safetensors nor model.safetensors.index.json, but consolidated.safetensors, which",
    ),
    "pickled": (
        "single",
        rename("pytorch_model.bin"),
        r"holds no safetensors files but pytorch_model.bin; convert",
    ),
    "adapter": ("single", write("adapter_config.json", "{}"), r"holds an adapter \(adapter_config.json\), .* merge it"),
    "folder of the Hub's cache": ("single", make_hub_folder, r"is one of the Hub's cache; give .*/snapshots/abc$"),
}


@pytest.mark.parametrize(("base", "edit", "shown"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(base: str, edit: Edit, shown: str, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / base, tmp_path / "theirs")
    edit(tmp_path / "theirs")
    with pytest.raises(UserError, match=shown):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".gguf", "a\0b", "~/nothing-here", ""], ids=range(5))
def test_what_is_no_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a folder here nor a repository|is not a whole GGUF file"):
        import_model(name, tmp_path / "ours")


def test_a_file_is_no_folder(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.safetensors is a file, but no GGUF file; give the folder it is in"):
        import_model(str(sources / "single" / SINGLE), tmp_path / "ours")


def test_vllm_would_load_other_weights(sources: Path, tmp_path: Path) -> None:
    """It takes consolidated files first, and with an index only what that names."""
    for base in ("single", "sharded"):
        require_same_for_vllm(sources / base)
    shutil.copytree(sources / "single", tmp_path / "old")
    add_old_shards(tmp_path / "old")
    with pytest.raises(UserError, match=r"vLLM would load model-00001-of-00001.safetensors, transformers model.safet"):
        require_same_for_vllm(tmp_path / "old")
    shutil.copytree(sources / "sharded", tmp_path / "consolidated")
    add_consolidated(tmp_path / "consolidated")
    with pytest.raises(UserError, match=r"vLLM would load consolidated.safetensors, transformers model.safetensors.i"):
        require_same_for_vllm(tmp_path / "consolidated")
