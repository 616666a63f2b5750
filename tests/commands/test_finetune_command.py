"""Fine-tuning from an imported model: what a run reads in any layout, what it says and stores, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.datasets import TOKENIZER as OURS
from support.datasets import write_dataset
from support.gguf_models import MODELS, write

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.cluster.preflight.probe import facts
from skvr_dist.commands.finetune import run
from skvr_dist.config.load import load_config
from skvr_dist.config.presets import find_config
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import IGNORED
from skvr_dist.data.reader import MicroBatchReader, SequenceStream
from skvr_dist.errors import UserError
from skvr_dist.evaluate.curve import HeldOutData
from skvr_dist.hf.convert.import_model import import_model
from skvr_dist.train.inputs import training_sequences

ROOT = Path(__file__).parents[2]
LENGTH = 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model with a tokenizer and a chat template, and files of examples."""
    folder = tmp_path_factory.mktemp("finetune")
    write(folder / "model.gguf", MODELS["llama"])
    import_model(str(folder / "model.gguf"), folder / "model", check=False)
    asked = [
        {"context": f"Item {n} costs {n * 7}. " * (n % 3 + 1), "question": f"{n}?", "answer": str(n * 7)}
        for n in range(60)
    ]
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]} for n in range(9)
    ]
    paragraphs = [{"context": "long " * 90, "qas": [{"question": "q?", "answers": [{"text": "long"}]}]}] * 20
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chats))
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


def arguments(files: Path, *more: str) -> list[str]:
    keys: dict[str, Any] = {
        "data.train": {
            "asked": {"path": f"{files}/asked.jsonl", "format": "examples", "weight": 2.0},
            "squad": {"path": f"{files}/squad.json", "format": "squad"},
            "chats": {"path": f"{files}/chats.jsonl", "format": "chat"},
        },
        "data.validation": {
            "asked": {"path": f"{files}/asked.jsonl", "format": "examples"},
            "squad": {"path": f"{files}/squad.json", "format": "squad"},
        },
        "data.sequence_length": LENGTH,
        "data.lanes": 8,
        "data.workers": 0,
        "train.output_dir": f"{files}/run",
        "train.steps": 2,
        "train.global_batch_size": 8,
        "train.warmup_steps": 1,
        "train.precision": "fp32",
        "evaluate.sequences": 4,
        "evaluate.strategies": ["full", "every:2"],
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    return ["--from", f"{files}/model", "--config", "finetune", *overrides, *more]


def started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What the command prints."""
    monkeypatch.setattr(sys, "argv", ["skvr-finetune", *words])
    run()
    return capsys.readouterr().out


def config_of(tmp_path: Path, printed: str) -> Config:
    (tmp_path / "config.yaml").write_text(printed)
    return load_config([tmp_path / "config.yaml"])


def test_a_run_from_an_import(files: Path) -> None:
    """It reads, cuts and counts as it says, trains on answers alone, and its checkpoint can be measured."""
    done = subprocess.run(
        [sys.executable, "launch/finetune.py", *arguments(files)],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data.train.asked: 60 examples, " in done.stdout
    assert "data.train.squad: 20 examples, 20 of them cut to fit, packed into 20 sequences of 64 tokens" in done.stdout
    checkpoint = Checkpoint(files / "run")
    assert checkpoint.step == 2 and checkpoint.facts.imported_from is not None
    assert set(checkpoint.facts.data_fingerprint["sources"]["squad"]) == {"weight", "examples"}  # type: ignore[index]
    metrics = [json.loads(line) for line in (files / "run/metrics.jsonl").read_text().splitlines()]
    first = next(record for record in metrics if "train/loss" in record)
    config = load_config([files / "run/config.yaml"])
    stream = training_sequences(config.data, config.train.seed, config.train)
    assert first["train/predicted_tokens"] == (stream.read(0, 8).labels != IGNORED).sum()
    batches = HeldOutData.of(checkpoint).batches(4, 4, "cpu")
    assert batches[0].documents is not None and int(batches[0].labels.max()) < 320


def test_the_order_is_the_same_in_every_layout_and_after_resuming(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, started(monkeypatch, capsys, arguments(files, "--print-config")))
    assert config.train.initial_weights == f"{files}/model" and config.routing.cross_layer_prob == 0.6

    def stream() -> SequenceStream:
        return training_sequences(config.data, config.train.seed, config.train)

    first = stream()
    sources = [first.source_of(number) for number in range(400)]
    assert [sources.count(name) for name in ("asked", "squad", "chats")] == [200, 100, 100]
    options: dict[str, Any] = {"micro_batch_size": 2, "micro_batches_per_step": 4}
    straight = [batch.labels.tolist() for batch in islice(MicroBatchReader(stream(), **options), 12)]
    readers = [MicroBatchReader(stream(), **options, replica=r, replicas=2, start_step=1) for r in range(2)]
    assert [next(readers[q % 2]).labels.tolist() for q in range(8)] == straight[4:]


def test_examples_and_documents_share_sequences_of_a_batch(files: Path, tmp_path: Path) -> None:
    """Shards beside examples, against forgetting: neither changes the other."""
    dataset = write_dataset(tmp_path / "shards", [[[n] * 30] * 8 for n in (7, 8)])
    OURS.save(tmp_path / "tokenizer.model")
    keys = {
        "data.train.text.path": dataset.location,
        "data.train.asked": {"path": f"{files}/asked.jsonl", "format": "examples"},
        "data.documents": "separate",
        "data.lanes": 2,
        "data.sequence_length": LENGTH,
        "data.tokenizer": f"{tmp_path}/tokenizer.model",
    }
    overrides = ["data.train={text: {path: x}}", *(f"{key}={json.dumps(value)}" for key, value in keys.items())]
    data = load_config([ROOT / "configs/experiment/quickstart.yaml"], overrides).data
    mixed = training_sequences(data, 3, None)
    alone = [
        training_sequences(data.model_copy(update={"train": {name: data.train[name]}}), 3, None) for name in data.train
    ]
    read = mixed.read(0, 4)
    for row, (name, number) in enumerate([("text", 0), ("asked", 1), ("asked", 0), ("text", 1)]):
        assert mixed.source_of(row) == name
        wanted = alone[name == "asked"].read(number, 1)
        for found, single in zip(read[:3], wanted[:3], strict=True):
            assert found is not None and single is not None and found[row].tolist() == single[0].tolist()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["data.train.squad.format=hotpotqa"], r"squad.json is no HotpotQA file \(it is no list\); expected a list of"),
        (["data.train.asked.format=chat"], r"asked.jsonl, line 1 is no record of chats \(messages: Field required\)"),
        (["data.train.asked.path=/dev/null"], "cannot read /dev/null: it is a device"),
        (
            ["data.sequence_length=8"],
            r"question and answer have \d+ tokens, more than data.sequence_length 8, even with",
        ),
        (["data.documents=joined"], "train.asked holds examples, each of which attends to itself alone, but documents"),
        (["evaluate.sequences=50"], r"fill \d+ sequences of 64 tokens, but 25 are asked for; lower evaluate.sequences"),
        (
            ["data.train={a: {path: x}}", "data.validation=x"],
            "fine-tuning reads examples, but all of data.train are sh",
        ),
        (["train.initial_weights=null"], "fine-tuning starts from a model, but none is named; give --from CHECKPOINT"),
        (
            ["data.tokenizer=TOKENIZER", "model.vocab_size=500"],
            r"data.tokenizer .*\.model has no chat template, which chats are written with",
        ),
    ],
)
def test_refused_with_a_sentence(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    sentence: str,
) -> None:
    OURS.save(tmp_path / "ours.model")
    more = [word.replace("TOKENIZER", f"{tmp_path}/ours.model") for word in more]
    if more[0].startswith("data.train={"):
        words = [word for word in arguments(files) if not word.startswith(("data.train=", "data.validation="))]
    else:
        words = arguments(files)
    with pytest.raises(UserError, match=sentence):
        started(monkeypatch, capsys, [*words, *more, "--dry-run", "--world-size=1"])


def test_an_empty_file_is_refused(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.jsonl holds no examples; give a file with at least one"):
        started(monkeypatch, capsys, arguments(files, f"data.train.asked.path={tmp_path}/empty.jsonl", "--dry-run"))
    assert "60 examples" in started(monkeypatch, capsys, arguments(files, "--dry-run"))


def test_the_preflight_reads_what_the_run_starts_from(files: Path) -> None:
    start, config, *overrides = ["--from", f"{files}/model"], str(find_config("finetune")), *arguments(files)[4:]
    assert facts([*start, config, "--", *overrides], [], "")["config"]
    with pytest.raises(UserError, match="model is missing"):  # without the model's section it is no configuration
        facts([config, "--", *overrides], [], "")
    with pytest.raises(UserError, match="absent"):
        facts(["--from", f"{files}/absent", config, "--", *overrides], [], "")
