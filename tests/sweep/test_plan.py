"""What an experiment file means: its runs, their names and configurations, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from skvr_dist.commands import sweep
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy
from skvr_dist.sweep.experiment import read_experiment, shortened
from skvr_dist.sweep.folder import SweepFolder
from skvr_dist.sweep.plan import PlannedRun, plan_runs

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {"output_dir": "out", "base": ["quickstart"], "overrides": ["parallel.pipeline=1"]}
KEEPING = ["checkpoint.every_steps=100", "checkpoint.keep_every_steps=200"]


def planned(folder: Path, *more: str, **keys: Any) -> list[PlannedRun]:
    (folder / "mine.yaml").write_text(yaml.safe_dump(COMMON | keys, sort_keys=False))
    return plan_runs(read_experiment(folder / "mine.yaml"), more)


def test_runs_are_named_by_what_they_change(tmp_path: Path) -> None:
    rise = {"points": [[0.0, 0.0], [0.5, 0.5]]}
    grid = {"routing.cross_layer_prob": [0.25, rise], "train.learning_rate": [1e-3]}
    runs = planned(tmp_path, "train.steps=50", grid=grid, runs={"a": [], "b": ["train.warmup_steps=3"]}, seeds=[0, 7])
    assert len(runs) == 2 * 2 * 2
    assert runs[0].name == "a_cross_layer_prob-0.25_learning_rate-0.001_seed-0"
    assert runs[2].name.startswith("a_cross_layer_prob-points-0.0-0.0-0.5-0.5-") and runs[2].name.endswith("_seed-0")
    last = runs[-1].config
    assert (last.train.seed, last.train.warmup_steps, last.train.steps, last.train.learning_rate) == (7, 3, 50, 1e-3)
    assert last.routing.model_dump()["cross_layer_prob"]["points"] == rise["points"]
    assert last.train.output_dir == f"out/{runs[-1].name}"
    assert [run.name for run in planned(tmp_path, grid=grid)] == [
        name.removeprefix("a_").removesuffix("_seed-0") for name in (runs[0].name, runs[2].name)
    ]


def test_a_key_is_named_whole_where_two_end_alike(tmp_path: Path) -> None:
    [run] = planned(tmp_path, grid={"evaluate.every_steps": [9], "checkpoint.every_steps": [8]})
    assert run.name == "evaluate.every_steps-9_checkpoint.every_steps-8"


def test_letters_stay_as_they_are(tmp_path: Path) -> None:
    [run] = planned(tmp_path, grid={"data.validation": ["2024-01-01"]}, output_dir="out \U0001f600")
    assert run.config.data.model_dump()["validation"]["validation"]["path"] == "2024-01-01"
    assert run.config.train.output_dir == f"out \U0001f600/{run.name}" and run.name == "validation-2024-01-01"


@pytest.mark.parametrize(
    ("override", "way"),
    [
        ("train.seed=7", "give --seed"),
        ("train.steps=9", "change grid.train.steps"),
        ("train={steps: 9}", "change grid.train.steps"),
    ],
)
def test_the_command_line_does_not_override_what_runs_are_called_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, way: str
) -> None:
    tree = COMMON | {"grid": {"train.steps": [50, 60]}, "seeds": [0, 1]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(sys, "argv", ["sweep", f"{tmp_path}/mine.yaml", "--output-dir", f"{tmp_path}/out", override])
    with pytest.raises(
        UserError, match=f"the command line sets {override.partition('=')[0]}, but .* is an axis of .*; {way}"
    ):
        sweep.run()


def test_branches_have_what_their_trunks_have(tmp_path: Path) -> None:
    runs = planned(
        tmp_path,
        runs={"trunk": ["train.learning_rate_decay=constant", *KEEPING]},
        seeds=[0, 1],
        branches={
            "decay": {"trunk": "trunk", "step": 400, "overrides": ["train.steps=500", "checkpoint.keep_last=1"]},
            "on": {"trunk": "decay", "step": 500, "overrides": ["train.steps=600"]},
        },
    )
    assert [run.name for run in runs] == [f"{name}_seed-{seed}" for name in ("trunk", "decay", "on") for seed in (0, 1)]
    decay, on = runs[3], runs[5]
    assert decay.config.train.resume == "out/trunk_seed-1/checkpoints/step-00000400" == str(decay.trunk)
    assert decay.trunk_name == "trunk_seed-1" and decay.config.train.learning_rate_decay == "constant"
    assert (on.config.checkpoint.keep_last, on.config.train.steps, on.config.train.seed) == (1, 600, 1)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "the experiment has no runs; give it runs, a grid or seeds"),
        ({"grid": {"train.seed": []}}, r"grid\.train\.seed of the experiment is empty; give it values, or"),
        ({"grid": {"train.seed": [1, 1]}}, "two runs of the experiment are called seed-1; give one another"),
        ({"seeds": [1], "branches": {"b": {"trunk": "a", "step": 1}}}, r"branches\.b .* off a, which is no run of it"),
        (
            {"runs": {"a": []}, "branches": {"b": {"trunk": "a", "step": 400, "overrides": ["train.steps=1200"]}}},
            r"run b of the experiment branches off step 400 of a, which keeps that of its last step, 1100, alone; set",
        ),
        (
            {"runs": {"a": KEEPING}, "branches": {"b": {"trunk": "a", "step": 400, "overrides": ["train.steps=400"]}}},
            "branches off step 400, but its train.steps 400 is no more; raise it",
        ),
        ({"runs": {"a": [], "b": []}, "branches": {"b": {"trunk": "a", "step": 1100}}}, "raise it|called b"),
        ({"runs": {"lock": []}}, "'lock' cannot be the name of a run"),
        ({"runs": {"../a": []}}, r"'\.\./a' cannot be the name of a run"),
        ({"runs": {"a": ["train.seed=1"]}, "seeds": [0]}, r"runs\.a of the experiment sets train\.seed, which has an"),
        ({"runs": {"a": ["train.output_dir=x"]}}, r"runs\.a of the experiment sets train\.output_dir, which the exp"),
        ({"runs": {"a": ["train.stepz=1"]}}, r"run a of the experiment: unknown key train\.stepz; did you mean steps"),
        (
            {"runs": {"a": ["metrics.writers=[wandb]"]}},
            r"run a .* has metrics\.writers \['wandb'\] without jsonl, which",
        ),
        ({"runs": {"a": []}, "place": {"ranks": 3}, "overrides": []}, "run a of the experiment: .*3"),
        ({"sedes": [1]}, r"mine\.yaml: unknown key sedes; did you mean seeds\?"),
        ({"branches": {"b": {"trunk": "a", "stp": 1}}}, r"unknown key branches\.b\.stp; did you mean step\?"),
        ({"place": {"kind": "cloud"}}, r"place\.kind is 'cloud'; allowed are 'local', 'slurm' or 'print'"),
        ({"base": ["quickstrat"]}, "cannot read configuration quickstrat"),
    ],
)
def test_refused_with_a_sentence(tmp_path: Path, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        planned(tmp_path, **keys)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SweepFolder(tmp_path / "out")
    runs = planned(tmp_path, runs={"a": []}, output_dir=str(folder.path))
    folder.require_of("mine", runs)
    folder.prepare("mine", runs)
    more = planned(tmp_path, runs={"a": [], "b": []}, output_dir=str(folder.path))
    folder.require_of("mine", more)
    monkeypatch.chdir(tmp_path)
    SweepFolder("out").require_of("mine", planned(tmp_path, runs={"a": []}, output_dir="out"))
    with pytest.raises(UserError, match="out holds the experiment mine, not the experiment yours; give another output"):
        folder.require_of("yours", runs)
    changed = planned(tmp_path, "train.steps=90", runs={"a": []}, output_dir=str(folder.path))
    with pytest.raises(UserError, match=r"run a in .* with another configuration: train\.steps was 1100 and is 90 now"):
        folder.require_of("mine", changed)
    with pytest.raises(UserError, match=r"holds mine\.yaml, not the experiment mine; give another output_dir"):
        SweepFolder(tmp_path).require_of("mine", runs)


def test_a_trial_has_the_same_runs_and_branches(tmp_path: Path) -> None:
    decay = ["train.learning_rate_decay=linear", "train.decay_steps=100"]
    runs: dict[str, Any] = {"trunk": ["train.learning_rate_decay=constant", *KEEPING, "train.steps=400"]}
    branches = {
        "decay": {"trunk": "trunk", "step": 400, "overrides": ["train.steps=500", *decay]},
        "on": {"trunk": "decay", "step": 500, "overrides": ["train.steps=600"]},
    }
    whole = planned(tmp_path, runs=runs, branches=branches)
    short = plan_runs(shortened(read_experiment(tmp_path / "mine.yaml"), 5))
    assert [run.name for run in short] == [run.name for run in whole]
    assert {(run.config.train.steps, run.config.train.warmup_steps) for run in short} == {(5, 1)}
    assert [run.config.train.decay_steps for run in short] == [None, 2, 2]
    assert [run.trunk and run.trunk.name for run in short] == [None, "step-00000003", "step-00000004"]


def test_every_experiment_of_the_project_can_be_planned() -> None:
    files = sorted((ROOT / "configs/experiment/sweeps").glob("*.yaml"))
    runs = {file.stem: plan_runs(read_experiment(file)) for file in files}
    assert len(runs["recipes"]) == 24
    for planned_runs in runs.values():
        for run in planned_runs:
            if run.config.routing.policy == "cla":  # other layers have learned no keys and values
                strategies = CacheStrategy.parse_all(run.config.evaluate.strategies, 8).values()
                assert all(layer % 2 == 0 for strategy in strategies for layer in strategy.retained)
    quickstart_tokens = {run.config.train.global_batch_size * run.config.train.steps for run in runs["recipes"]}
    assert quickstart_tokens == {4400}  # sequences of 256
