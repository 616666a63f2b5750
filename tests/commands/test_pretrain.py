"""The main job for real: the deepspeed launcher, four ranks, real text; then resume, retention, export and report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.programs import run_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.cluster.launcher import free_port
from skvr_dist.config.load import load_config
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy
from skvr_dist.run.folder import RunFolder
from skvr_dist.run.lock import RunLock
from skvr_dist.train.dry_run import describe
from skvr_dist.train.inputs import open_inputs
from skvr_dist.train.resume import preview_resume

ROOT = Path(__file__).parents[2]
STEPS, BATCH, SEQUENCE = 4, 8, 64
SMALL = [
    "--config",
    "configs/experiment/quickstart.yaml",
    "routing.cross_layer_prob={points: [[0.0, 0.25], [0.5, 0.5]]}",
    "model.num_hidden_layers=4",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    f"train.steps={STEPS}",
    f"train.global_batch_size={BATCH}",
    "train.micro_batch_size=2",
    "train.warmup_steps=1",
    "train.log_every_steps=1",
    f"data.sequence_length={SEQUENCE}",
    "data.lanes=4",
    "evaluate.every_steps=2",
    "evaluate.sequences=8",
    "checkpoint.every_steps=2",
]


def environment() -> dict[str, str]:
    """Of a launcher: our programs first, one thread per rank, a port of its own for mpirun."""
    ours = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {"DS_ACCELERATOR": "cpu", **os.environ, **ours, "MASTER_PORT": str(free_port())}


def run(*command: str, code: int = 0) -> str:
    """Run a command of the project from its root; returns what it printed."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of a few modules of the standard library."""
    source, folder = Path(os.__file__).parent / "json", tmp_path_factory.mktemp("data")
    corpus = folder / "corpus"
    shutil.copytree(source, corpus, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("argparse", "ast", "dataclasses", "enum", "heapq", "inspect", "tarfile", "typing", "shlex", "string"):
        shutil.copy(source.parent / f"{name}.py", corpus)
    model = str(folder / "tokenizer.model")
    run_here("tools/train_tokenizer.py", "--input", str(corpus), "--vocab-size", "512", "--output", model)
    prepare = ["--input", str(corpus), "--tokenizer", model, "--output", str(folder / "set")]
    run_here("tools/prepare_data.py", *prepare, "--shards", "4", "--validation-share", "0.25")
    return folder / "set"


def data_keys(data: Path) -> list[str]:
    return [f"data.train={data}/train", f"data.validation={data}/validation", f"data.tokenizer={data}/tokenizer.model"]


def pretrain(output: Path, data: Path, *overrides: str, ranks: int = 4, code: int = 0) -> str:
    """Train with DeepSpeed's launcher, of two stages; or, on one rank, without either."""
    launcher = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--log_level", "error"]
    arguments = ["launch/pretrain.py", *SMALL, *data_keys(data), f"train.output_dir={output}", *overrides]
    if ranks == 1:
        return run(sys.executable, *arguments, "parallel.pipeline=1", code=code)
    return run(*launcher, *arguments, code=code)


@pytest.fixture(scope="module")
def routed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "routed"
    folder.mkdir()
    (folder / "console.txt").write_text(pretrain(folder, data))
    return folder


def records(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(routed: Path) -> None:
    console = (routed / "console.txt").read_text()
    assert "4 ranks: 2 stages x 2 replicas" in console
    assert console.count("attention: sdpa (flash kernels are for GPUs)") == 1
    for step in range(1, STEPS + 1):
        assert f"step {step}/{STEPS}  loss " in console
    assert "held-out loss  full " in console

    resolved = yaml.safe_load((routed / "config.yaml").read_text())
    assert resolved["model"]["num_hidden_layers"] == 4
    versions = json.loads((routed / "versions.json").read_text())
    assert versions["deepspeed"].startswith("0.19.") and versions["layout"]["replicas"] == 2
    assert sorted(path.name for path in (routed / "logs").iterdir()) == [f"rank-{rank:05d}.log" for rank in range(4)]
    noted = [f"step {STEPS} loss" in path.read_text() for path in sorted((routed / "logs").iterdir())]
    assert noted == [True, False, False, False], "rank 0 notes each step, the others what they must"
    assert (routed / "checkpoints/latest").read_text() == f"step-{STEPS:08d}\n"
    assert not list((routed / "checkpoints").glob("*.partial"))


def test_metrics_and_tensorboard(routed: Path) -> None:
    steps = [record for record in records(routed) if "train/loss" in record]
    evaluations = [record for record in records(routed) if "evaluate/loss/full" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluations] == [2, STEPS]
    assert all(0 < record["train/loss"] < 10 and record["train/gradient_norm"] > 0 for record in steps)
    assert [record["routing/cross_layer_prob"] for record in steps] == [0.25, 0.375, 0.5, 0.5]
    assert {record["routing/full_retention_share"] for record in steps} == {0.0}
    assert {f"evaluate/loss/{name}" for name in ("full", "every:2", "every:4")} < set(evaluations[0])
    events = EventAccumulator(str(routed / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags == {tag for record in records(routed) for tag in record} - {"step"}
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx([record["train/loss"] for record in steps], rel=1e-6)


def test_crossing_bytes_in_the_log_are_the_liveness_bound(routed: Path) -> None:
    from skvr_dist.parallel.split import stage_bounds
    from skvr_dist.routing import crossing_elements
    from skvr_dist.train.plans import plan_of_step

    config = load_config([routed / "config.yaml"])
    boundary = stage_bounds(config.model, config.parallel, config.data.sequence_length)[0][1]
    size = {"tokens": 2 * SEQUENCE, "hidden_size": config.model.hidden_size, "kv_size": config.model.kv_size}
    for record in records(routed):
        if "train/loss" in record:
            plan = plan_of_step(config, record["step"] - 1)
            bound = sum(4 * crossing_elements(donors, boundary, **size) for donors in plan.donors)
            assert record["pipeline/crossing_bytes/boundary_0"] == bound


def test_resuming_under_mpirun_is_as_if_never_stopped(routed: Path, data: Path, tmp_path: Path) -> None:
    """From an earlier step of the run itself; the later one is set aside, and no other run may come between.

    Everything is to the bit what it was under DeepSpeed's launcher, so the launcher makes no difference either.
    """
    stopped = tmp_path / "stopped"
    shutil.copytree(routed, stopped)
    before, wanted = records(stopped), records(routed)
    goes_back = f"train.resume={stopped}/checkpoints/step-00000002"
    lock = RunLock(stopped, "other")
    output = pretrain(stopped, data, goes_back, ranks=1, code=2)
    assert output.count("error: ") == 1 and f"{stopped} is in use: process {os.getpid()} on " in output
    assert records(stopped) == before
    lock.release()
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "4", sys.executable, "launch/pretrain.py"]
    output = run(*mpirun, *SMALL, *data_keys(data), f"train.output_dir={stopped}", goes_back)
    aside = stopped / f"checkpoints/set-aside/step-{STEPS:08d}"
    assert "checkpoints/step-00000002 at step 2" in output and f"set aside: {aside}" in output
    assert Checkpoint(aside, verify=True).step == STEPS
    assert (stopped / "checkpoints/latest").read_text() == f"step-{STEPS:08d}\n"
    after = records(stopped)
    assert [record["step"] for record in after] == [record["step"] for record in wanted]  # nothing twice
    for record, straight in zip(after, wanted, strict=True):
        if record["step"] <= 2:
            assert record in before
        measured = ("per_second", "wait", "tflops", "memory/", "time/", "ranks/")
        timed = {tag for tag in record if any(part in tag for part in measured)}
        assert {tag: record[tag] for tag in set(record) - timed} == {tag: straight[tag] for tag in set(record) - timed}
    events = EventAccumulator(str(stopped / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    a, b = Checkpoint(stopped), Checkpoint(routed)
    assert a.step == b.step == STEPS
    for name in b.weight_names():
        assert torch.equal(a.weight(name), b.weight(name)), name


def test_a_preempted_run_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    """SIGUSR1 to what keeps the real launcher running, as Slurm sends it; the same command then trains to the end."""
    steps, folder = 30, tmp_path / "run"
    keys = [*SMALL, *data_keys(data), f"train.output_dir={folder}", f"train.steps={steps}", "evaluate.every_steps=1"]
    keys += ["checkpoint.every_steps=1000", "evaluate.strategies=[full]"]
    keep = [sys.executable, "launch/keep_running.py", "--output-dir", str(folder), "--"]
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "launch/pretrain.py"]
    command = [*keep, *launcher, *keys]
    first = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while first.poll() is None and not ((folder / "metrics.jsonl").exists() and records(folder)):
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 75, output
    stopped = Checkpoint(folder).step
    assert 0 < stopped < steps
    assert f"SIGTERM ended the run after step {stopped}, which is saved; start it again" in output
    assert "not started again after SIGUSR1" in output
    assert Checkpoint(folder).facts.evaluation_due
    assert f"at step {stopped}" in run(*command)
    for tag in ("train/loss", "evaluate/loss/full"):
        assert [record["step"] for record in records(folder) if tag in record] == list(range(1, steps + 1))


def test_control_c_saves_before_the_run_ends(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it: to all processes of the run, those that read ahead among them, and twice."""
    folder = tmp_path / "run"
    keys = [*SMALL, *data_keys(data), f"train.output_dir={folder}", "train.steps=1000", "parallel.pipeline=1"]
    command = [sys.executable, "launch/pretrain.py", *keys, "checkpoint.every_steps=1000", "evaluate.every_steps=1000"]
    process = subprocess.Popen(
        [*command, "data.workers=1"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and records(folder)):
        time.sleep(0.05)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert f"error: SIGINT ended the run after step {Checkpoint(folder).step}, which is saved" in stderr
    assert "Traceback" not in stderr
    assert (RunFolder(folder).interruption() or {})["by"] == "SIGINT"


def test_bad_input_ends_with_one_sentence_and_code_2(routed: Path, data: Path) -> None:
    before = sorted(routed.rglob("*"))
    output = pretrain(routed, data, "train.stepz=5", ranks=2, code=2)
    assert output.count("error: ") == 1  # said once, not by every rank
    assert "unknown key train.stepz; did you mean steps?" in output
    assert "Traceback" not in output
    assert sorted(routed.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_size=64"], "has model.hidden_size 32, the configuration 64"),
        (
            ["routing.cross_layer_prob=0.6"],
            "has routing.cross_layer_prob 0.25 at 0.0 to 0.5 at 0.5 of the run, the configuration 0.6; .*on_resume=",
        ),
        (["routing.policy=uniform"], "has routing.policy strategy, the configuration uniform"),
        (
            ["train.steps=8"],
            r"at step 5 that would move the learning rate over its peak from 0\.1 to 0\.\d+; .*_steps=4 ",
        ),
        (
            ["train.learning_rate_from_step=1", "train.output_dir=/new"],
            "from_step is 1, but the run goes on from step 0",
        ),
        (["train.global_batch_size=16"], "has train.global_batch_size 8, the configuration 16"),
        (["evaluate.sequences=10000"], "sequences of 64 tokens, but 10000 are asked for"),
        (["train.steps=3"], "is at step 4, but train.steps is 3; set it to 4 or more"),
        (["train.seed=5"], "has train.seed 0, the configuration 5"),
        (["data.lanes=2", "train.micro_batch_size=1"], "has train.micro_batch_size 2, the configuration 1"),
        (["train.resume=never"], "already holds checkpoints"),
        (["train.resume=/nowhere"], "/nowhere is neither a checkpoint"),
        (["train.output_dir=/new", "train.initial_weights=/nowhere"], "/nowhere is neither a checkpoint"),
        (
            ["train.output_dir=/new", "train.initial_weights=ROUTED", "model.num_hidden_layers=3"],
            "initial weights .* have model.num_hidden_layers 4, the configuration 3",
        ),
        (["data.train=/nowhere"], "/nowhere holds no complete data set"),
        (["data.tokenizer=pyproject.toml"], "is not a sentencepiece model"),
        (["model.vocab_size=100"], "has a vocabulary of 512, but model.vocab_size is 100"),
        (["data.lanes=8"], "has 4 shards, fewer than data.lanes 8"),
        (
            ["train.precision=bf16", "parallel.zero_stage=1", "model.attention=fa4"],
            "flash-attn-4 is not installed; inst",
        ),
        (["train.global_batch_size=10"], "which 2 replicas cannot share equally"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_process_group(
    routed: Path, data: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not there
    overrides = [override.replace("ROUTED", str(routed)) for override in overrides]
    keys = [*SMALL[2:], *data_keys(data), f"train.output_dir={routed}", *overrides]
    config = load_config([ROOT / SMALL[1]], keys)
    with pytest.raises(UserError, match=message):
        preview_resume(config, open_inputs(config, world_size=4).sequences.fingerprint())


def test_a_shard_that_breaks_during_the_run_is_named(data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "set"
    shutil.copytree(data, broken)
    for shard in (broken / "train").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1  # same size, another content
        shard.write_bytes(content)
    output = pretrain(tmp_path / "run", broken, ranks=2, code=2)
    assert "error: shard " in output and "is damaged" in output
    assert not (tmp_path / "run/checkpoints/latest").exists()


def test_dry_run_and_print_config(data: Path, tmp_path: Path) -> None:
    keys = [*SMALL, *data_keys(data), f"train.output_dir={tmp_path / 'new'}"]
    dry = run_here("launch/pretrain.py", *keys, "--dry-run", "--world-size", "4")
    assert "4 = 2 stages x 2 replicas" in dry and '"train_micro_batch_size_per_gpu": 2' in dry
    printed = run_here("launch/pretrain.py", *keys, "--print-config")
    assert yaml.safe_load(printed)["train"]["steps"] == STEPS
    assert not (tmp_path / "new").exists()


def test_dry_run_counts_the_tokens_of_a_resumed_run(routed: Path, data: Path) -> None:
    """The steps before the checkpoint have seen sequences of their own length."""
    shorter = ["data.sequence_length=32", "data.on_resume=other_data", "train.on_resume=other_schedule"]
    keys = [*SMALL[2:], *data_keys(data), f"train.output_dir={routed}", f"train.steps={STEPS + 2}"]
    text = describe(load_config([ROOT / SMALL[1]], [*keys, *shorter]), world_size=4)
    assert f"{BATCH * 32}, {STEPS * BATCH * SEQUENCE + 2 * BATCH * 32:,}\n" in text
    (epochs,) = re.findall(rf"(\d\.\d\d) epochs from step {STEPS} on", text)
    assert float(epochs) < 0.05


def test_retention_export_and_report(routed: Path, data: Path, tmp_path: Path) -> None:
    standard = tmp_path / "standard"
    pretrain(standard, data, "routing.policy=none", "routing.cross_layer_prob=null", ranks=1)

    table = run_here("tools/retention.py", str(routed), "--strategies", "full", "every:2", "0,3", "--sequences", "8")
    folder = Checkpoint(routed).folder
    points = json.loads((folder / "retention.json").read_text())["points"]
    assert [point["strategy"] for point in points] == ["full", "every:2", "0,3"]
    assert [point["retention"] for point in points] == [1.0, 0.5, 0.5]
    assert all(f"{point['loss']:.4f}" in table for point in points)
    assert (folder / "retention.png").read_bytes().startswith(b"\x89PNG")
    during = next(r for r in records(routed) if r["step"] == STEPS and "evaluate/loss/full" in r)
    assert points[0]["loss"] == pytest.approx(during["evaluate/loss/full"], rel=1e-5)  # 8 sequences there too

    apart = tmp_path / "apart.json"
    words = [str(routed), "--strategies", "full", "--sequences", "8", "--documents", "separate"]
    assert "--documents needs --json" in run_here("tools/retention.py", *words, code=2)
    assert "documents separate" in run_here("tools/retention.py", *words, "--json", str(apart))
    assert json.loads(apart.read_text())["documents"] == "separate"

    exported = tmp_path / "hf"
    run_here("tools/export_hf.py", str(routed), str(exported), "--json", str(tmp_path / "export.json"))
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("def main():\n    return 1\n", return_tensors="pt").input_ids
    decoder = Checkpoint(routed).load_decoder()
    with torch.no_grad():
        ours = decoder(ids, CacheStrategy.full(4).kv_source_layers)
        torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-5)

    runs = ["--standard", str(standard), "--routed", str(routed), "--output", str(tmp_path / "report")]
    run_here("tools/report.py", *runs, "--strategies", "full", "every:2", "--sequences", "8")
    text = (tmp_path / "report/report.md").read_text()
    assert "retention.png" in text and "every:2" in text and "tokens/s" in text
    record = json.loads((tmp_path / "report/report.json").read_text())
    assert set(record["runs"]) == {"standard", "routed"}
    assert [(s["run"], s["retention"]) for s in record["samples"]] == [
        ("standard", 1.0),
        ("standard", 0.5),
        ("routed", 1.0),
        ("routed", 0.5),
    ]
    by_place = {(s["run"], s["retention"]): s["cache_bytes"] / (128 + len(s["tokens"]) - 1) for s in record["samples"]}
    assert by_place["routed", 1.0] == by_place["standard", 1.0] == 2 * by_place["routed", 0.5]
    assert record["runs"]["standard"]["skipped_kv_share"] == 0 < record["runs"]["routed"]["skipped_kv_share"]
