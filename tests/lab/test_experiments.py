"""Experiments tried out with a tiny model: what fails is seen, and the others go on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from skvr_dist.commands.verify import experiments as command


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"wrong": ["train.only=[no_such_module]"], "right": [], "branching": ["train.learning_rate_decay=constant"]}
    decay = ["train.steps=800", "train.learning_rate_decay=linear", "train.decay_steps=200"]
    branch = {"trunk": "branching", "step": 600, "overrides": decay}
    tree = {"output_dir": "anywhere", "base": ["quickstart"], "overrides": ["parallel.pipeline=1"], "runs": runs}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tree, "seeds": [3, 4], "branches": {"decay": branch}}))
    files, output = [tmp_path / "mine.yaml"], tmp_path / "kept"
    options = argparse.Namespace(files=files, corpus=None, output=output, json=tmp_path / "runs.json")
    assert command.run(options) == 1
    shown = capsys.readouterr().out
    assert "1 of 4 runs failed; bound none: missed" in shown
    assert "no_such_module" in shown
    states = {row["run"]: row["state"] for row in json.loads(options.json.read_text())}
    right = ["right_seed-3", "branching_seed-3", "decay_seed-3"]
    assert states == {"wrong_seed-3": "failed", **dict.fromkeys(right, "finished")}
    assert (output / "figures" / "retention.png").exists()
    assert "held-out loss" in (output / "mine" / "right_seed-3" / "console.txt").read_text()
