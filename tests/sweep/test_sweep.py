"""A sweep of real small runs that is killed, ended by Ctrl-C and started again: nothing finished is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.datasets import TOKENIZER, write_dataset

from skvr_dist.cluster.processes import marked_processes
from skvr_dist.commands import sweep
from skvr_dist.run.folder import RunFolder
from skvr_dist.sweep.places import MARK

ROOT = Path(__file__).parents[2]
STEPS, BRANCH_STEP = 160, 40
LONGER = ["train.steps=42", "data.sequence_length=48", "data.on_resume=other_data"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk, and a branch off it that begins while it goes on."""
    folder = tmp_path_factory.mktemp("sweep")
    drawn = random.Random(0)
    for name in ("train", "validation"):
        write_dataset(folder / name, [[[drawn.randrange(400) for _ in range(900)] for _ in range(2)] for _ in range(4)])
    TOKENIZER.save(folder / "tokenizer.model")
    sizes = ["vocab_size=500", "hidden_size=32", "intermediate_size=48", "num_hidden_layers=2"]
    data = [f"{key}={folder}/{key}" for key in ("train", "validation")] + [f"tokenizer={folder}/tokenizer.model"]
    tree = {
        "output_dir": str(folder / "out"),
        "base": ["quickstart"],
        "overrides": [
            *(f"model.{size}" for size in sizes),
            *(f"data.{key}" for key in [*data, "sequence_length=16", "lanes=4"]),
            *("parallel.pipeline=1", "evaluate.sequences=4", "evaluate.every_steps=60"),
            *(f"train.{key}" for key in (f"steps={STEPS}", "warmup_steps=1", "learning_rate_decay=constant")),
            f"checkpoint.every_steps={BRANCH_STEP}",
            f"checkpoint.keep_every_steps={BRANCH_STEP}",
            'evaluate.strategies=[full, "every:2"]',
        ],
        "runs": {"trunk": []},
        "seeds": [3],
        "branches": {
            "branch": {"trunk": "trunk", "step": BRANCH_STEP, "overrides": ["train.steps=60"]},
            "longer": {"trunk": "trunk", "step": BRANCH_STEP, "overrides": LONGER},
        },
        "place": {"at_once": 2},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "small.yaml"


def start(experiment: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "tools/sweep.py", str(experiment)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_step(started: subprocess.Popen[str], run: RunFolder, after: int) -> int:
    """Wait until a run has done a further step; returns it."""
    deadline = time.monotonic() + 120
    while (step := max((int(record["step"]) for record in run.metric_records()), default=0)) <= after:
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0]
        time.sleep(0.01)
    return step


def results(experiment: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (experiment.parent / "out/results.jsonl").read_text().splitlines()]
    return {line["name"]: line for line in lines}


def test_a_sweep_that_is_killed_goes_on_and_repeats_nothing_finished(experiment: Path) -> None:
    trunk = RunFolder(experiment.parent / "out/trunk_seed-3")
    killed = start(experiment)
    step = wait_for_step(killed, trunk, 0)
    killed.kill()
    for rank in marked_processes(MARK, str(trunk.path.parent)):  # as when the machine dies
        rank.kill()
    killed.communicate()

    interrupted = start(experiment)
    assert interrupted.stdout is not None
    while "trunk_seed-3: running" not in interrupted.stdout.readline():
        assert interrupted.poll() is None
    step = wait_for_step(interrupted, trunk, wait_for_step(interrupted, trunk, 0))
    interrupted.send_signal(signal.SIGINT)
    output = interrupted.communicate(timeout=120)[0]
    assert interrupted.returncode == 75, output
    assert "error: SIGINT ended the sweep with 0 of 3 runs finished; start it again, it goes on" in output
    held = results(experiment)
    assert held["trunk_seed-3"]["state"] == "unfinished" and held["trunk_seed-3"]["step"] >= step
    saved = trunk.checkpoints / f"step-{held['trunk_seed-3']['step']:08d}"
    assert saved.is_dir()

    through = start(experiment)
    output = through.communicate(timeout=240)[0]
    assert through.returncode == 0, output
    assert f"resumed {saved}" in trunk.console.read_text()
    held = results(experiment)
    assert {name: line["state"] for name, line in held.items()} == dict.fromkeys(held, "finished")
    trunk_line, branch_line = held["trunk_seed-3"], held["branch_seed-3"]
    assert (trunk_line["step"], trunk_line["tokens"], trunk_line["seed"]) == (STEPS, STEPS * 4 * 16, 3)
    assert held["longer_seed-3"]["tokens"] == BRANCH_STEP * 4 * 16 + 2 * 4 * 48  # as read, whatever is read now
    assert trunk_line["held_out"].keys() == {"full", "every:2"} and trunk_line["seconds"] > 0
    assert [step for step, _ in trunk_line["held_out_by_step"]] == [60, 120, 160]
    assert [step for step, _ in branch_line["held_out_by_step"]] == [60]
    # The same schedule on the same tokens: up to there the branch is its trunk.
    assert branch_line["held_out"] == trunk_line["held_out_by_step"][0][1]
    assert trunk_line["version"] and len(trunk_line["commits"]) == 1

    add_a_run_that_cannot_begin(experiment)
    consoles = {path: path.read_bytes() for path in experiment.parent.glob("out/*_seed-3/console.txt")}
    again = start(experiment)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 1 and "failed: broken_seed-3: exit code 2: " in output and "absent" in output, output
    assert len(consoles) == 3 and all(path.read_bytes() == content for path, content in consoles.items())
    assert results(experiment)["trunk_seed-3"] == trunk_line
    assert results(experiment)["broken_seed-3"]["state"] == "failed"


def add_a_run_that_cannot_begin(experiment: Path) -> None:
    tree = yaml.safe_load(experiment.read_text())
    tree["runs"]["broken"] = [f"data.validation={experiment.parent}/absent"]
    experiment.write_text(yaml.safe_dump(tree, sort_keys=False))


def test_commands_are_printed_for_what_is_left(
    experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_a_run_that_cannot_begin(experiment)
    monkeypatch.setattr(sys, "argv", ["sweep", str(experiment), "--place", "print"])
    assert sweep.run() == 0
    left = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert str(experiment.parent / "out/broken_seed-3/config.yaml") in left
