"""The writers of a run's records: what each takes, and that none of them ends a run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skvr_dist.config.load import load_config
from skvr_dist.config.metrics import MetricsConfig
from skvr_dist.errors import UserError
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.metrics import Reporter
from skvr_dist.train.writers import require_writers

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"
MODULE = """
taken, closed = [], []
def write(step, values):
    taken.append((step, values))
    values["mine"] = 1.0
write.close = lambda: closed.append(True)
def breaks(step, values):
    taken.append(step)
    if step == 2:
        raise RuntimeError("two\\nlines")
number = 5
def nothing():
    pass
class Writer:
    async def __call__(self, step, values):
        pass
awaited = Writer()
"""
SHOWN = ("loss", "predicted_tokens", "learning_rate", "gradient_norm", "tokens_per_second")
VALUES = {f"train/{name}": 2.0 for name in SHOWN} | {"routing/cross_layer_share": 0.5, "routing/skipped_kv_share": 0.25}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a user's: `of_user` and one that cannot be imported."""
    (tmp_path / "of_user.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "of_user", raising=False)


def reporter_of(folder: Path, writers: list[str], first_step: int = 0) -> tuple[Reporter, list[str]]:
    settings = MetricsConfig(writers=writers)
    reporter = Reporter(
        0, RunFolder(folder), first_step=first_step, steps=4, console_lost=lambda: None, settings=settings
    )
    said: list[str] = []
    reporter.say = said.append  # type: ignore[method-assign, assignment]
    reporter._writers._say = said.append
    return reporter, said


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.usefixtures("module")
def test_every_writer_takes_every_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    reporter, _ = reporter_of(run, ["of_user.write", "jsonl", "tensorboard"])
    reporter.step(1, VALUES | {"train/mfu": math.nan}, show=False)
    reporter.evaluation(1, {"full": 3.5})
    reporter.step(2, VALUES, show=False)
    reporter.close()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, **VALUES, "train/mfu": None}
    assert lines[1:] == [{"step": 1, "evaluate/loss/full": 3.5}, {"step": 2, **VALUES}]
    assert scalars(run, "train/loss") == [(1, 2.0), (2, 2.0)] and scalars(run, "evaluate/loss/full") == [(1, 3.5)]
    user = sys.modules["of_user"]
    assert [step for step, _ in user.taken] == [1, 1, 2] and user.closed == [True]
    assert user.taken[1][1] == {"evaluate/loss/full": 3.5, "mine": 1.0}

    reporter, _ = reporter_of(run, ["jsonl", "tensorboard"], first_step=1)  # step 2 is done again, step 1 evaluated
    reporter.evaluation(1, {"full": 9.0})
    reporter.step(2, VALUES | {"train/loss": 1.0}, show=False)
    reporter.close()
    assert [record["step"] for record in RunFolder(run).metric_records()] == [1, 1, 2]
    assert scalars(run, "train/loss") == [(1, 2.0), (2, 1.0)]


@pytest.mark.usefixtures("module")
def test_one_that_fails_is_said_once_and_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    reporter, said = reporter_of(run, ["of_user.breaks", "jsonl"])
    for step in (1, 2, 3):
        if step == 3:
            (run / "metrics.jsonl").unlink()
            (run / "metrics.jsonl").mkdir()
        reporter.step(step, VALUES, show=False)
    reporter.step(4, VALUES, show=False)
    reporter.close()
    assert sys.modules["of_user"].taken == [1, 2]
    assert said == [
        "metrics.writers of_user.breaks failed at step 2 and is left out from here on: RuntimeError: two lines",
        f"metrics.writers jsonl failed at step 3 and is left out from here on: cannot write {run}/metrics.jsonl: "
        f"Is a directory",
    ]


@pytest.mark.usefixtures("module")
def test_one_that_would_end_the_process_is_left_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("of_user"), "breaks", lambda *_: sys.exit(3))
    (tmp_path / "run").mkdir()
    reporter, said = reporter_of(tmp_path / "run", ["of_user.breaks", "jsonl"])
    reporter.step(1, VALUES, show=False)
    reporter.step(2, VALUES, show=False)
    reporter.close()
    assert said == ["metrics.writers of_user.breaks failed at step 1 and is left out from here on: SystemExit: 3"]
    assert len(RunFolder(tmp_path / "run").metric_records()) == 2


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("absent.module.write", r"names absent\.module\.write, but absent\.module cannot be imported \(ModuleNotFound"),
        ("broken.write", r"but broken cannot be imported \(ZeroDivisionError: division by zero\); put its folder on"),
        ("of_user.absent", r"names of_user\.absent, but of_user has nothing of that name; name a callable of of_user"),
        ("of_user.number", "but that is no callable, but 5; name a callable of of_user"),
        ("of_user.nothing", r"which cannot take a record \(too many positional arguments\); name one that is"),
        ("of_user.Writer", r"which cannot take a record"),
        ("of_user.awaited", r"names of_user\.awaited, which is async, and nobody would await it; name one that is"),
    ],
)
def test_callables_that_are_missing_or_take_no_records_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        require_writers(MetricsConfig(writers=["jsonl", name]))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("[tensorbord]", "metrics.writers: 'tensorbord' is none of jsonl, tensorboard, wandb, and no dotted name"),
        ("[jsonl, jsonl]", "metrics.writers: jsonl is there twice; leave one out"),
    ],
)
def test_wrong_lists_are_refused(names: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config([QUICKSTART], [f"metrics.writers={names}"])
    assert sentence in str(refused.value)


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None, is_package=True)], ids=["nothing", "a folder"])
def test_without_wandb_it_is_refused(found: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=r"the package wandb is not installed here; install it \(pip install wandb\)"):
        require_writers(MetricsConfig(writers=["jsonl", "wandb"]))


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    RunFolder(tmp_path).note(id="abc123")
    RunFolder(tmp_path).config.write_text("train: {steps: 4}\n")
    reporter, said = reporter_of(tmp_path, ["wandb"])
    reporter.step(1, VALUES, show=False)
    reporter.close()
    assert said == [] and list((tmp_path / "wandb").glob("offline-run-*-abc123/run-abc123.wandb"))
