"""Training reads through this path: two sources, a damaged shard that is skipped, a resume with other data."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skvr_dist.config.load import load_config
from skvr_dist.data.prepare.corpus import Corpus, open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.shards import Dataset
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import UserError
from skvr_dist.train.inputs import open_inputs
from skvr_dist.train.resume import preview_resume

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/experiment/quickstart.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets, code and mail, with one tokenizer."""
    folder = tmp_path_factory.mktemp("training")
    documents = [d for d in open_corpus("stdlib") if d.id.startswith(("json/", "email/"))]
    tokenizer = train_tokenizer(documents, vocab_size=500)
    for name in ("json", "email"):
        corpus = folder / f"{name}.jsonl"
        texts = [text for d in documents if d.id.startswith(name) for text in d.text.split("\n\n")]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare(Corpus(corpus), tokenizer, folder / name, num_shards=4, validation_share=0.2, workers=1)
    return folder


def arguments(data: Path, output: Path) -> list[str]:
    keys = {
        "data.train": f"{{code: {{path: {data}/json/train, weight: 3}}, mail: {{path: {data}/email/train}}}}",
        "data.validation": f"{data}/json/validation",
        "data.tokenizer": f"{data}/json/tokenizer.model",
        "data.lanes": "4",
        "data.sequence_length": "64",
        "model.num_hidden_layers": "2",
        "model.hidden_size": "32",
        "model.intermediate_size": "48",
        "parallel.pipeline": "1",
        "train.output_dir": str(output),
        "train.steps": "3",
        "train.warmup_steps": "1",
        "evaluate.sequences": "4",
        "evaluate.strategies": "[full]",
    }
    return [f"{key}={value}" for key, value in keys.items()]


def pretrain(data: Path, output: Path, *overrides: str) -> str:
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", "--config", str(QUICKSTART), *arguments(data, output), *overrides],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def refusal(data: Path, output: Path, *overrides: str) -> str:
    """What a run that would start like this says instead."""
    with pytest.raises(UserError) as caught:
        start(data, output, *overrides)
    return str(caught.value)


def start(data: Path, output: Path, *overrides: str) -> None:
    """What a run checks before its first step."""
    config = load_config([QUICKSTART], [*arguments(data, output), *overrides])
    inputs = open_inputs(config, world_size=1)
    preview_resume(config, inputs.sequences.fingerprint(), inputs.tokenizer)


def test_damage_is_skipped_counted_and_logged_and_a_resume_tells_what_differs(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shard = data / "email" / "train" / "shard-00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600])
    try:
        assert "email/train/shard-00001.tar has 600 bytes, but the manifest names" in refusal(data, run)
        said = pretrain(data, run, "data.damage=skip", "data.workers=2")
    finally:
        shard.write_bytes(whole)
    log = (run / "logs" / "rank-00000.log").read_text()
    assert (
        log.count("left out: shard ") == 1 and "shard-00001.tar is damaged: chunk 0 at byte 512: the file ends" in log
    )
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    # Sequence 5 is the first of lane 1 that comes from the second source; a label of each position of it is lost.
    assert [event.value for event in events.Scalars("data/skipped_tokens")] == [0.0, 64.0, 64.0]
    all_tokens = load_config([QUICKSTART]).train.global_batch_size * 64
    predicted = [event.value for event in events.Scalars("train/predicted_tokens")]
    assert predicted == [all_tokens, all_tokens - 64, all_tokens]
    assert f"over {all_tokens - 64} tokens gradient norm" in log and f"over {all_tokens:,} tokens  lr" in said
    assert Dataset.open(data / "email" / "train").manifest.shards[1].tokens > 64

    other = ["train.steps=4", "train.on_resume=other_schedule", "data.lanes=2", "data.sequence_length=32"]
    said = refusal(data, run, *other)
    assert "they differ in sequence_length (64 there, 32 here), lanes (4 there, 2 here); put it back" in said
    assert "data.on_resume=other_data" in said
    start(data, run, *other, "data.on_resume=other_data")
    assert "has train.seed 0, the configuration 1; give the checkpoint's own" in refusal(data, run, "train.seed=1")
    longer = ["train.steps=4", "train.on_resume=other_schedule"]
    start(data, run, *longer)
    swapped = f"data.train={{mail: {{path: {data}/email/train}}, code: {{path: {data}/json/train, weight: 3}}}}"
    rest = [each for each in arguments(data, run) if not each.startswith("data.train=")]
    config = load_config([QUICKSTART], [swapped, *rest, *longer])
    with pytest.raises(UserError, match=r"the order of sources \(code, mail there, mail, code here\)"):
        preview_resume(config, open_inputs(config, world_size=1).sequences.fingerprint())


@pytest.mark.parametrize("key", ["initial_weights", "resume"])
def test_weights_of_another_tokenizer_are_refused(data: Path, tmp_path: Path, key: str) -> None:
    """Of as many tokens, too: ids would be other texts."""
    trained, other = tmp_path / "trained", tmp_path / "other"
    pretrain(data, trained, "train.steps=1")
    documents = [d for d in open_corpus("stdlib") if d.id.startswith("email/")]
    tokenizer = train_tokenizer(documents, vocab_size=500)
    prepare(Corpus(data / "email.jsonl"), tokenizer, other, num_shards=4, validation_share=0.2, workers=1)
    sets = {"train": other / "train", "validation": other / "validation", "tokenizer": other / "tokenizer.model"}
    mine = [f"train.{key}={trained}", "data.on_resume=other_data", "train.on_resume=other_schedule"]
    start(data, tmp_path / "run", *mine)
    said = refusal(data, tmp_path / "run", *mine, *(f"data.{name}={path}" for name, path in sets.items()))
    assert f"are other texts; prepare the data with {trained}/checkpoints/" in said


def test_held_out_data_that_is_trained_on_is_said(data: Path, tmp_path: Path) -> None:
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"context": "a", "question": "b", "answer": "c"}) + "\n")
    asked = f"{{path: {examples}, format: examples}}"
    shutil.copytree(data / "json/train", tmp_path / "copied")
    words = [
        f"data.train={{code: {{path: {data}/json/train}}, asked: {asked}}}",
        f"data.validation={{same: {{path: {tmp_path}/copied}}, mail: {{path: {data}/email/validation}}, ask: {asked}}}",
        *("data.documents=separate", "train.seed=3", "evaluate.sequences=3", "train.micro_batch_size=1"),
    ]
    notices = open_inputs(load_config([QUICKSTART], [*arguments(data, tmp_path), *words]), world_size=1).notices
    assert [notice.split(":")[0] for notice in notices] == [
        "data.validation.same is also trained on, as data.train.code",
        "data.validation.ask is also trained on, as data.train.asked",
    ]


def test_the_documented_offload(data: Path, tmp_path: Path) -> None:
    """As the guide says it, word for word."""
    page = (ROOT / "docs" / "parallel.md").read_text()
    (line,) = (line for line in page.splitlines() if "offload_optimizer: {" in line)
    overrides = [word for word in shlex.split(line) if "=" in word]
    assert "parallel.zero_stage=2" in overrides and any(word.startswith("deepspeed.") for word in overrides)
    pretrain(data, tmp_path / "run", *overrides)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == 3 and losses[2] < losses[0]
