"""Experiments tried out with a tiny model: what fails is seen, and the others go on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import yaml

from skvr_dist.commands.verify import experiments as command
from skvr_dist.errors import UserError


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"wrong": ["train.only=[no_such_module]"], "right": [], "branching": ["train.learning_rate_decay=constant"]}
    decay = ["train.steps=800", "train.learning_rate_decay=linear", "train.decay_steps=200"]
    branch = {"trunk": "branching", "step": 600, "overrides": decay}
    tree = {"output_dir": "anywhere", "base": ["quickstart"], "overrides": ["parallel.pipeline=1"], "runs": runs}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**tree, "seeds": [3, 4], "branches": {"decay": branch}}))
    words, output = [str(tmp_path / "mine.yaml"), "train.weight_decay=0.0"], tmp_path / "kept"
    options = argparse.Namespace(words=words, corpus=None, output=output, json=tmp_path / "runs.json")
    assert command.run(options) == 1
    shown = capsys.readouterr().out
    assert "1 of 4 runs failed; bound none: missed" in shown
    assert "no_such_module" in shown
    states = {row["run"]: row["state"] for row in json.loads(options.json.read_text())}
    right = ["right_seed-3", "branching_seed-3", "decay_seed-3"]
    assert states == {"wrong_seed-3": "failed", **dict.fromkeys(right, "finished")}
    assert (output / "figures" / "retention.png").exists()
    assert "held-out loss" in (output / "runs" / "mine" / "right_seed-3" / "console.txt").read_text()


def refused(*words: str, **options: object) -> str:
    with pytest.raises(UserError) as error:
        command.run(argparse.Namespace(**{"words": words, "corpus": None, "output": None, "json": None, **options}))
    return str(error.value)


def test_what_cannot_be_tried_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        tree = {"output_dir": "anywhere", "base": ["quickstart"], "overrides": ["parallel.pipeline=1"]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**tree, "runs": {"a": []}, "place": {"ranks": ranks}}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.yaml").write_text("")
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    assert "place.ranks is 2, but runs are tried with 1; use tools/sweep.py" in refused(one, two)
    assert "two experiments are called one" in refused(one, str(tmp_path / "other" / "one.yaml"))
    assert "no-such.yaml" in refused("no-such.yaml")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "text.txt").write_text("a few words")
    assert "has too little text to try experiments out with" in refused(one, corpus=tmp_path / "few")
