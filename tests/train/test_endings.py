"""A rank that dies, or meets something of its own, at any moment of a run: all ranks say which and why, and end."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.datasets import TOKENIZER, write_dataset

from skvr_dist.checkpoint import saver
from skvr_dist.config.load import load_config
from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel import failure
from skvr_dist.run.folder import RunFolder
from skvr_dist.train import loop, metrics

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"

# What a rank runs at each moment: where it is, and which call of it is taken.
MOMENTS: dict[str, tuple[Any, str]] = {
    "before the first step": (metrics, "Writers"),
    "between two steps": (metrics.Reporter, "step"),
    "in an evaluation": (metrics.Reporter, "evaluation"),
    "in a save": (saver, "write_pieces"),
}


def the_disk_is_full() -> None:
    raise UserError("cannot write /full/metrics.jsonl: No space left on device")


def tensorboard_fails() -> None:
    raise OSError(errno.EIO, "Input/output error", "/broken")


def it_dies() -> None:
    os._exit(9)


def pretrain_until(overrides: list[str], rank: int, moment: str, fate: Callable[[], None]) -> tuple[str, str]:
    """Train on two stages; one rank meets its fate. How this rank ends, in kind and words."""
    failure._ROLL_CALL_SECONDS = 3.0
    if os.environ["RANK"] == str(rank):
        place, name = MOMENTS[moment]
        kept = getattr(place, name)

        def met(*args: Any, **kwargs: Any) -> Any:
            result = kept(*args, **kwargs)
            fate()
            return result

        setattr(place, name, met)
    try:
        loop.pretrain(load_config([QUICKSTART], overrides))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it ran to its end"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "set", [[[5 + n, 6, 7] * 30] for n in range(4)])
    TOKENIZER.save(folder / "tokenizer.model")
    small = ["model.num_hidden_layers=2", "model.hidden_size=32", "model.intermediate_size=48", "parallel.pipeline=2"]
    small += ["train.steps=6", "train.global_batch_size=4", "train.micro_batch_size=2", "train.warmup_steps=1"]
    small += ["data.sequence_length=16", "data.lanes=4", "data.workers=0", f"data.tokenizer={folder}/tokenizer.model"]
    small += [f"data.train={folder}/set", f"data.validation={folder}/set", "evaluate.sequences=2"]
    return [*small, "evaluate.strategies=[full]", "evaluate.every_steps=2", "checkpoint.every_steps=2"]


@pytest.mark.parametrize(
    ("rank", "moment"),
    [(0, "between two steps"), (1, "in an evaluation"), (1, "in a save")],
)
def test_a_rank_that_dies_is_named(keys: list[str], tmp_path: Path, rank: int, moment: str) -> None:
    overrides = [*keys, f"train.output_dir={tmp_path}", "parallel.timeout_seconds=40"]
    ends = run_ranks(2, pretrain_until, overrides, rank, moment, it_dies, may_die=True)
    assert ends[rank] is None
    kind, said = ends[1 - rank]
    assert kind == RunInterrupted.__name__
    assert f"no sign of life from rank {rank}" in said and "start the run again" in said


@pytest.mark.parametrize(
    ("rank", "moment"),
    [(0, "before the first step"), (0, "between two steps"), (1, "in an evaluation")],
)
def test_what_one_rank_meets_ends_all_with_its_sentence(
    keys: list[str], tmp_path: Path, rank: int, moment: str
) -> None:
    ends = run_ranks(2, pretrain_until, [*keys, f"train.output_dir={tmp_path}"], rank, moment, the_disk_is_full)
    assert ends[rank] == ("UserError", "cannot write /full/metrics.jsonl: No space left on device")
    kind, said = ends[1 - rank]
    assert kind == "EndedByAnotherRankError"  # exit code 2, as the rank itself: to start again would not help
    assert f"because rank {rank} has ended: cannot write /full/metrics.jsonl: No space left on device" in said


def test_what_nobody_foresaw_on_one_rank_is_said_by_all(keys: list[str], tmp_path: Path) -> None:
    moment = "between two steps"
    ends = run_ranks(2, pretrain_until, [*keys, f"train.output_dir={tmp_path}"], 1, moment, tensorboard_fails)
    assert ends[1] == ("OSError", "[Errno 5] Input/output error: '/broken'")
    kind, said = ends[0]
    assert kind == "RunInterrupted"
    assert "because rank 1 has ended: OSError: [Errno 5] Input/output error: '/broken'" in said


def pretrain_where_no_save_succeeds(overrides: list[str]) -> tuple[str, str]:
    def fails(*_: Any, **__: Any) -> dict[str, str]:
        raise UserError("no space left")

    saver.write_pieces = fails
    try:
        loop.pretrain(load_config([QUICKSTART], overrides))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", "it ran to its end"


def test_a_save_that_failed_ends_the_run_long_before_the_next_one(keys: list[str], tmp_path: Path) -> None:
    overrides = [*keys, f"train.output_dir={tmp_path}", "train.steps=200", "checkpoint.every_steps=100"]
    overrides += ["evaluate.every_steps=200"]
    assert run_ranks(2, pretrain_where_no_save_succeeds, overrides) == [("UserError", "no space left")] * 2
    assert RunFolder(tmp_path).metric_records()[-1]["step"] < 150
