"""What a model brought along survives import, training and export, or its loss is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_models import edit_config, published, shape_of
from support.tokenizers import TEXT, train_ours
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from skvr_dist.checkpoint.brought import Brought, brought_by, to_travel_on
from skvr_dist.checkpoint.folder import Checkpoint, publish, step_folder, write_facts
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.card import Training
from skvr_dist.hf.convert.export import ExportReport, export_model
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.hf.convert.tokenizer import convert_tokenizer

MESSAGES = [{"role": "user", "content": "x"}]
VOCABULARY = 320


def save_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level, with a padding token, the end of a turn and two chat templates."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = ["<pad>", "<bos>", "<eos>", "<turn>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([TEXT], trainer)
    given = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "right"} | options
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, additional_special_tokens=["<turn>"], model_max_length=77, **given
    )
    tokenizer.chat_template = {
        "default": "{% for m in messages %}{{ m.content }}<turn>{% endfor %}",
        "tool_use": "{{ 1 }}",
    }
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct model: two ends, in config.json and in the settings of generation."""
    folder = tmp_path_factory.mktemp("source")
    published(shape_of("llama", vocab_size=VOCABULARY, num_hidden_layers=2), folder)
    save_tokenizer(folder)
    edit_config(bos_token_id=1, eos_token_id=[2, 3], pad_token_id=0)(folder)
    GenerationConfig(eos_token_id=[2, 3], pad_token_id=0, temperature=0.6, do_sample=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("imported") / "ours"
    import_model(str(source), folder)
    return Checkpoint(folder)


def train(checkpoint: Checkpoint, brought: Brought, files: dict[str, bytes], checkpoints: Path) -> Checkpoint:
    """The checkpoint that a run writes which starts from another one, but for its steps."""
    partial = checkpoints / f"{step_folder(1)}.partial"
    partial.mkdir(parents=True)
    for file in (*checkpoint.folder.glob("*.distcp"), checkpoint.folder / "index.json"):
        shutil.copy(file, partial)
    facts = checkpoint.facts.model_copy(
        update={"step": 1, "data_fingerprint": {"seed": 0}, "special_ids": brought.special_ids}
    )
    config = (checkpoint.folder / "config.yaml").read_text()
    write_facts(partial, config_text=config, facts=facts, files=files)
    publish(partial, checkpoints / step_folder(1), {})
    return Checkpoint(checkpoints / step_folder(1))


def export(checkpoint: Checkpoint, folder: Path) -> ExportReport:
    return export_model(
        checkpoint.model_config,
        checkpoint.weight_names(),
        checkpoint.weight,
        checkpoint.tokenizer_file,
        folder,
        training=Training.of(checkpoint),
        dtype=torch.float32,
        brought=brought_by(checkpoint),
    )


def test_all_of_it_survives(source: Path, imported: Checkpoint, tmp_path: Path) -> None:
    """Through two runs, the second of which starts from the first, on data with the model's own tokenizer."""
    tokenizer, checkpoint = load_tokenizer(source), imported
    for run in ("first", "second"):
        brought, lost = to_travel_on(checkpoint, tokenizer)
        assert lost is None and brought.names_tokenizer
        checkpoint = train(checkpoint, brought, brought.files, tmp_path / run)
        assert load_tokenizer(checkpoint.tokenizer_file or "").sha256 == tokenizer.sha256
    report = export(checkpoint, tmp_path / "export")
    assert report.left_behind is None
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes(), name
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "export"))
    for name in ("pad_token", "eos_token", "bos_token", "padding_side", "model_max_length", "split_special_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.chat_template.keys() == {"default", "tool_use"}
    assert ours.apply_chat_template(MESSAGES)["input_ids"] == theirs.apply_chat_template(MESSAGES)["input_ids"]
    assert ours("a<turn>")["input_ids"][-1] == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([2, 3], 0)
    assert (model.generation_config.eos_token_id, model.generation_config.temperature) == ([2, 3], 0.6)


def test_the_loss_is_said_where_the_data_has_another_tokenizer(imported: Checkpoint, tmp_path: Path) -> None:
    other = load_tokenizer(train_ours(tmp_path / "tokenizer.model"))
    brought, lost = to_travel_on(imported, other)
    assert brought == Brought() and lost is not None
    assert (
        f"came with a tokenizer {load_tokenizer(imported.folder).sha256[:15]}, but the data has {other.sha256[:15]}"
        in lost
    )
    assert "chat template and settings of generation are left behind" in lost
    trained = train(imported, brought, {"tokenizer.model": other.model}, tmp_path / "run")
    assert brought_by(trained) == Brought()  # its tokenizer is that of its data
    assert to_travel_on(None, other) == (Brought(), None)


def test_settings_of_generation_alone_survive(source: Path, tmp_path: Path) -> None:
    """A model without a tokenizer, in whose config.json they are."""
    bare = tmp_path / "bare"
    published(shape_of("llama", vocab_size=VOCABULARY, num_hidden_layers=2), bare)
    (bare / "generation_config.json").unlink()
    edit_config(eos_token_id=[2, 3], temperature=0.7, do_sample=True)(bare)
    import_model(str(bare), tmp_path / "ours", check=False)
    imported = Checkpoint(tmp_path / "ours")
    brought, lost = to_travel_on(imported, load_tokenizer(source))
    assert lost is None and not brought.names_tokenizer
    export(imported, tmp_path / "export")
    wanted, found = (AutoModelForCausalLM.from_pretrained(folder) for folder in (bare, tmp_path / "export"))
    for field in ("eos_token_id", "temperature", "do_sample", "top_p"):
        assert getattr(found.generation_config, field) == getattr(wanted.generation_config, field), field
    assert (found.config.eos_token_id, found.generation_config.temperature) == ([2, 3], 0.7)


def test_the_padding_token_of_a_data_set(tmp_path: Path) -> None:
    """It is in the one file that data sets keep, and does not change by what they name their tokenizer."""
    save_tokenizer(tmp_path / "theirs")
    kept = load_tokenizer(tmp_path / "theirs")
    kept.save(tmp_path / "tokenizer.model")
    converted = convert_tokenizer(tmp_path / "tokenizer.model", 128)
    assert (converted.pad_token, converted.eos_token) == ("<pad>", "<eos>")
    content = json.loads(kept.model)
    assert content.pop("pad_token") == "<pad>"
    earlier = tmp_path / "earlier.model"  # as the releases before wrote it
    earlier.write_bytes(json.dumps(content, ensure_ascii=False, sort_keys=True).encode())
    assert load_tokenizer(earlier).sha256 == kept.sha256
    kept.save(earlier)  # the same tokenizer
    assert json.loads(earlier.read_bytes()) == content
    assert convert_tokenizer(earlier, 128).pad_token == "<eos>"
    save_tokenizer(tmp_path / "other", eos_token="<turn>")
    with pytest.raises(UserError, match=r"earlier.model holds another tokenizer"):
        load_tokenizer(tmp_path / "other").save(earlier)


def test_special_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    """As tokenizers have them that were saved by older releases of transformers."""
    save_tokenizer(tmp_path)
    wanted = load_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    moved = {name: settings.pop(name) for name in ("eos_token", "pad_token")}
    settings.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(moved))
    assert load_tokenizer(tmp_path).model == wanted.model


def test_an_export_says_what_the_data_did_not_keep(imported: Checkpoint, source: Path, tmp_path: Path) -> None:
    trained = train(imported, Brought(), {"tokenizer.model": load_tokenizer(source).model}, tmp_path / "run")
    report = export(trained, tmp_path / "export")
    assert report.left_behind is not None and "no chat template, and names of special tokens" in report.left_behind
    assert AutoTokenizer.from_pretrained(tmp_path / "export").pad_token == "<pad>"


def cut(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:50])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokenizer cut short": (
        cut("tokenizer.json"),
        r"tokenizer.json \(.*\); download it again, or remove it to do with",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer.json \(Model missing"),
    "its settings": (cut("tokenizer_config.json"), r"tokenizer_config.json \("),
    "a list": (lambda f: (f / "special_tokens_map.json").write_text("[]"), r"\(it holds no JSON object\)"),
    "generation": (cut("generation_config.json"), r"generation_config.json \("),
}


@pytest.mark.parametrize(("breaks", "shown"), BROKEN.values(), ids=BROKEN)
def test_damaged_files_are_named(breaks: Callable[[Path], Any], shown: str, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "theirs")
    breaks(tmp_path / "theirs")
    with pytest.raises(UserError, match=rf"^cannot read {tmp_path}/theirs/.*{shown}"):
        import_model(str(tmp_path / "theirs"), tmp_path / "ours", check=False)
    assert not list(tmp_path.glob("ours*"))


def test_a_tokenizer_of_python_code_is_refused(source: Path, tmp_path: Path) -> None:
    """Nobody is asked whether it may run."""
    shutil.copytree(source, tmp_path / "theirs")
    file = tmp_path / "theirs/tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **code}))
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", check=False)
    with pytest.raises(UserError, match=r"^transformers cannot load the tokenizer in .* \(ValueError: .* or do with"):
        export(Checkpoint(tmp_path / "ours"), tmp_path / "export")


def test_a_fast_tokenizer_is_made_of_other_files(source: Path, tmp_path: Path) -> None:
    """Data is prepared with a tokenizer.json."""
    theirs = tmp_path / "theirs"
    shutil.copytree(source, theirs)
    content = json.loads((theirs / "tokenizer.json").read_text())["model"]
    (theirs / "vocab.json").write_text(json.dumps(content["vocab"]))
    (theirs / "merges.txt").write_text("\n".join(" ".join(merge) for merge in content["merges"]))
    (theirs / "tokenizer.json").unlink()
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    report = import_model(str(theirs), tmp_path / "ours", check=False)
    assert "merges.txt" in report.tokenizer and report.tokenizer.endswith("made of them by transformers")
    ids = load_tokenizer(Checkpoint(tmp_path / "ours").folder).encode(TEXT)
    assert ids == AutoTokenizer.from_pretrained(theirs)(TEXT, add_special_tokens=False, verbose=False)["input_ids"]
