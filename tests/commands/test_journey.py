"""From a published checkpoint to a smaller cache, by the very commands and code of docs/serving.md, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_models import CHAT_TEMPLATE, MODELS, byte_level_tokenizer, write
from support.tokenizers import TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.data.prepare.corpus import Corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.load import load_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.evaluate.curve import HeldOutData
from skvr_dist.evaluate.retention import retention_curve
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.routing import CacheStrategy

ROOT = Path(__file__).parents[2]
STEPS = 2
# What makes the documented commands small.
SMALLER = {
    "--input stdlib": "--input texts --workers 1 --shards 4 --validation-share 0.4",
    "--sequence-length 512": "--sequence-length 32",
    "--sequences 64": "--sequences 9",
    "--count 1": "--count 1 data.sequence_length=32 data.lanes=4",
    "deepspeed --num_gpus 2": "python",
}
OVERRIDES = {
    "data.sequence_length": 32,
    "data.lanes": 4,
    "train.steps": STEPS,
    "train.warmup_steps": 1,
    "train.global_batch_size": 4,
    "train.precision": "fp32",
    "evaluate.sequences": 4,
}


def documented() -> tuple[list[list[str]], str]:
    """The commands of the section, as words, and its Python code."""
    page = (ROOT / "docs/serving.md").read_text()
    section = re.search(r"^## From a published checkpoint.*?(?=^## )", page, re.M | re.S)
    assert section is not None
    commands, code = (re.findall(rf"^```{kind}\n(.*?)^```", section[0], re.M | re.S) for kind in ("bash", "python"))
    text = "".join(commands)
    for long, short in SMALLER.items():
        assert long in text
        text = text.replace(long, short)
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()], "".join(code)


def start(words: Sequence[str]) -> int:
    """A tool in this process, which has all modules; the training in one of its own. Returns the exit code."""
    script = Path(words[1])
    assert words[0] == "python" and script.exists()
    if script.parts[0] == "launch":
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        overrides = [f"{key}={value}" for key, value in OVERRIDES.items()]
        done = subprocess.run(
            [sys.executable, *words[1:], *overrides], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", [str(script), *words[2:]])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the project's commands run as from its root, with a model and texts."""
    for name in ("tools", "launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXT.split("\n    def ")):
        (tmp_path / "texts" / f"{number:03}.txt").write_text(text)
    write(tmp_path / "model.gguf", MODELS["llama"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record_of(checkpoint: Checkpoint) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((checkpoint.folder / "retention.json").read_text())
    return record


def require_measured_alike(export: Path, trained: Checkpoint) -> None:
    """An export has the curve of the run that it is from."""
    given = ["--data", "data/imported/validation", "--sequence-length", "32", "--sequences", "9"]
    assert start(["python", "tools/retention.py", str(export), *given]) == 0
    points = json.loads((export / "retention.json").read_text())["points"]
    for mine, theirs in zip(points, record_of(trained)["points"], strict=True):
        assert (mine["strategy"], mine["loss"]) == (theirs["strategy"], pytest.approx(theirs["loss"], abs=1e-5))


def test_the_documented_journey(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands, code = documented()
    assert [Path(words[1]).stem for words in commands] == [
        "import_hf",
        "prepare_data",
        "retention",
        "show_data",
        "pretrain",
        "retention",
        "report",
        "export_hf",
    ]
    for words in commands:
        assert start(words) == 0, shlex.join(words)
    shown = capsys.readouterr().out

    imported, trained = Checkpoint("runs/imported"), Checkpoint("runs/trained-on")
    held_out = Dataset.open("data/imported/validation")
    for checkpoint, strategies in ((imported, 5), (trained, 5)):
        record = record_of(checkpoint)
        assert (record["step"], len(record["points"])) == (checkpoint.step, strategies)
        assert (record["data"], record["data_fingerprint"]) == ("data/imported/validation", held_out.fingerprint)
        # 9 are asked for, in batches of 8.
        assert (record["sequences"], record["sequence_length"], record["tokens"]) == (16, 32, 16 * 32)
        assert record["documents"] == "joined"
        assert f"({held_out.fingerprint})" in shown
    # What was measured is what the decoder says of those sequences.
    batches = HeldOutData.of(trained).batches(9, 8, "cpu")
    again = retention_curve(trained.load_decoder(), batches, {"every:2": CacheStrategy.parse("every:2", 3)})
    assert record_of(trained)["points"][1]["loss"] == again[0].loss

    assert "======== sequence 0 from train: 32 tokens" in shown
    assert re.search(r"^\| tokenizer +\| copied as it is", shown, re.M)
    report = (workspace / "runs/trained-on/report.md").read_text()
    assert "`standard` was imported from model.gguf; `routed` was imported from model.gguf, then trained here" in report
    assert json.loads((workspace / "runs/trained-on/report.json").read_text())["measured"]["tokens"] == 16 * 32

    assert trained.step == STEPS and trained.facts.imported_from == "model.gguf"
    assert trained.facts.dequantized_from == imported.facts.dequantized_from
    assert not torch.equal(trained.weight("norm.weight"), imported.weight("norm.weight"))
    card = (workspace / "exports/trained-on/README.md").read_text()
    assert f"Its training began with weights dequantized from {imported.facts.dequantized_from}" in card
    assert "Over 16 held-out sequences of 32 tokens" in card
    require_measured_alike(workspace / "exports/trained-on", trained)
    gate = ["python", "tools/retention.py", "runs/trained-on", "--sequences", "9", "--gate", "every:2=-9"]
    assert start(gate) == 1 and "bound <= -9.0000: missed" in capsys.readouterr().out

    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["model"].retained_layers == (0, 2)
    assert capsys.readouterr().out.startswith("def main(")
    tokenizer = AutoTokenizer.from_pretrained("exports/trained-on")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    chat = tokenizer.apply_chat_template([{"content": "x"}], return_dict=True)["input_ids"]
    assert chat == [1, *tokenizer("x")["input_ids"], 2]
    ids = tokenizer(TEXT[:200], return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained("exports/trained-on", dtype=torch.float32)
    with torch.no_grad():
        ours = trained.load_decoder()(ids, CacheStrategy.full(3).kv_source_layers)
        torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-5)


def test_what_a_tool_misses_is_named(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_model("model.gguf", workspace / "runs/imported", check=False)
    checkpoint = Checkpoint(workspace / "runs/imported")
    prepare(
        Corpus(workspace / "texts"),
        load_tokenizer(checkpoint.folder),
        workspace / "data",
        num_shards=4,
        validation_share=0.4,
        workers=1,
    )
    settings = ["--config", str(checkpoint.folder / "config.yaml")]
    data = [f"data.{name}={workspace}/data/{name}" for name in ("train", "validation")]
    keys = [*data, f"data.tokenizer={checkpoint.folder}", "data.sequence_length=32", "data.lanes=4"]

    def said(name: str, *arguments: str) -> str:
        assert start(["python", f"tools/{name}.py", *arguments]) == 2
        return capsys.readouterr().err

    error = said("retention", "runs/imported")
    assert "names no held-out data, for it was imported; give --data FOLDER (" in error
    pair = ["--standard", "runs/imported", "--routed", "runs/imported", "--output", "out"]
    assert "give --data FOLDER (" in said("report", *pair)
    error = said("show_data", *settings)
    assert "add data.train=... data.validation=... data.tokenizer=... data.sequence_length=...\n" in error
    assert "data.tokenizer is missing" in said("show_data", *settings, *data, "data.sequence_length=32")
    assert "did you mean lanes?" in said("show_data", *settings, *keys, "data.lane=4")
    assert "train.seed is -1" in said("show_data", *settings, *keys, "train.seed=-1")
    assert start(["python", "tools/show_data.py", *settings, *keys, "train.seed=1", "--count", "1"]) == 0
    given = ["--data", "data/validation", "--sequence-length", "32", "--sequences", "8"]
    assert start(["python", "tools/report.py", *pair, *given]) == 0


def test_data_of_another_tokenizer_is_refused(workspace: Path) -> None:
    """Its tokens are in the vocabulary, and mean something else."""
    import_model("model.gguf", workspace / "runs/imported", check=False)
    (workspace / "other").mkdir()
    byte_level_tokenizer([TEXT.upper()], 320).save(str(workspace / "other/tokenizer.json"))
    (workspace / "other/tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    other = load_tokenizer(workspace / "other")
    prepare(Corpus(workspace / "texts"), other, workspace / "data", num_shards=1, validation_share=0.4, workers=1)
    checkpoint = Checkpoint("runs/imported")
    with pytest.raises(
        UserError, match=r"was made with tokenizer \w+, but checkpoint .* has \w+; prepare one with --t"
    ):
        HeldOutData.of(checkpoint, "data/validation", 32).require_fits(checkpoint)
