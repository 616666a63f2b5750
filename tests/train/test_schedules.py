"""The learning rate of every step, and which schedules a run may resume with."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.load import dump_config, load_config
from skvr_dist.config.stored import StoredConfig
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.lab.verify import reference
from skvr_dist.train.same_schedule import require_begun, require_same_schedule, schedule_jumps
from skvr_dist.train.schedules import data_weights, learning_rate_factor, peak_learning_rate, routing_rates

QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"
RISING = "routing.cross_layer_prob={points: [[0.0, 0.0], [0.5, 0.5]]}"


def quickstart(*overrides: str) -> Config:
    return load_config([QUICKSTART], overrides)


def factors(*overrides: str, steps: range = range(12)) -> list[float]:
    train = quickstart("train.steps=10", "train.warmup_steps=2", *overrides).train
    return [learning_rate_factor(train, step) for step in steps]


def test_the_usual_learning_rate_has_the_digits_that_it_always_had() -> None:
    """Warm-up and cosine, by the formula of the first release, to the bit."""
    for steps, warmup, floor in [(1100, 40, 0.1), (7, 0, 0.0), (1, 0, 0.1), (3, 3, 0.3), (5, 4, 0.1)]:
        keys = [f"train.steps={steps}", f"train.warmup_steps={warmup}", f"train.min_learning_rate_ratio={floor}"]
        train = quickstart(*keys).train
        for step in range(steps + 2):
            if step < warmup:
                wanted = (step + 1) / warmup
            else:
                progress = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
                wanted = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
            assert learning_rate_factor(train, step) == wanted


def test_other_decays() -> None:
    assert factors("train.learning_rate_decay=constant") == [0.5, *[1.0] * 11]
    linear = factors("train.learning_rate_decay=linear", "train.min_learning_rate_ratio=0.3")
    assert linear == pytest.approx([0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.3])
    stable = factors("train.learning_rate_decay=linear", "train.decay_steps=4", "train.min_learning_rate_ratio=0")
    assert stable == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    assert factors("train.decay_steps=8") == factors()


def test_a_schedule_of_learning_rates() -> None:
    """In place of a peak: the same as warm-up and decay, drawn by hand; and multiplied with a warm-up."""
    points = "train.learning_rate={points: [[0.0, 0.003], [0.1, 0.006], [0.2, 0.006], [0.9, 0.0018]]}"
    level = "train.learning_rate_decay=constant"
    linear = factors("train.learning_rate_decay=linear", "train.min_learning_rate_ratio=0.3")
    assert factors(points, level, "train.warmup_steps=0") == pytest.approx(linear)
    assert peak_learning_rate(quickstart(points, level).train) == 0.006
    assert factors(points, level)[:3] == [0.25, 1.0, 1.0]


def test_a_horizon_and_a_beginning_of_their_own() -> None:
    assert factors("train.schedule_steps=6") == factors("train.steps=6")
    anew = factors("train.steps=16", "train.learning_rate_from_step=6", steps=range(6, 16))
    assert anew == factors(steps=range(10))


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("decay_steps", [None, 5])
def test_the_reference_has_the_same_learning_rate(decay: str, decay_steps: int | None) -> None:
    found = factors(f"train.learning_rate_decay={decay}", f"train.decay_steps={decay_steps or 'null'}")[:10]
    how: dict[str, Any] = {"decay": decay, "decay_steps": decay_steps, "warmup_steps": 2, "floor": 0.1}
    assert found == pytest.approx([reference.learning_rate(step, peak=1.0, steps=10, **how) for step in range(10)])


def test_rates_of_the_routing() -> None:
    config = quickstart(RISING, "routing.full_retention_share={points: [[100, 0.5]], unit: steps}")
    assert routing_rates(config, 275) == {"cross_layer_prob": 0.25, "full_retention_share": 0.5}
    assert routing_rates(quickstart("routing.policy=none", "routing.cross_layer_prob=null"), 5) == {}


def test_weights_of_sources_that_change() -> None:
    sources = "data.train={a: {path: x}, b: {path: y, weight: {points: [[0.5, 0.0], [0.5, 3.0]]}}}"
    assert [data_weights(quickstart(sources), step) for step in (549, 550)] == [{"b": 0.0}, {"b": 3.0}]
    assert data_weights(quickstart(), 5) == {}


def checkpoint_of(config: Config, step: int) -> Checkpoint:
    """What is read of a checkpoint of a run with this configuration."""
    import yaml

    stored = StoredConfig.model_validate(yaml.safe_load(dump_config(config)))
    return cast(Checkpoint, SimpleNamespace(folder="CKPT", step=step, config=stored))


def test_a_longer_run_is_a_named_choice() -> None:
    """A finished quickstart, trained on: its learning rate would rise 5.6 times."""
    finished = checkpoint_of(quickstart(), 1100)
    longer = "train.steps=2200"
    with pytest.raises(UserError) as refused:
        require_same_schedule(finished, quickstart(longer))
    sentence = str(refused.value)
    assert "train.steps (1100 there, 2200 here): at step 1101" in sentence
    assert "the learning rate over its peak from 0.1 to 0.5" in sentence
    for way_out in (
        "train.schedule_steps=1100",
        "train.on_resume=other_schedule",
        "train.learning_rate_from_step=1100",
    ):
        assert way_out in sentence
    kept = quickstart(longer, "train.schedule_steps=1100")
    require_same_schedule(finished, kept)
    assert {learning_rate_factor(kept.train, step) for step in range(1100, 2200)} == {0.1}
    require_same_schedule(finished, quickstart(longer, "train.on_resume=other_schedule"))
    anew = quickstart(longer, "train.on_resume=other_schedule", "train.learning_rate_from_step=1100")
    require_same_schedule(finished, anew)
    require_same_schedule(checkpoint_of(anew, 1500), quickstart(longer, "train.learning_rate_from_step=1100"))
    assert [learning_rate_factor(anew.train, step) for step in (1100, 1139, 2199)] == [1 / 40, 1.0, 0.1]


def test_a_trunk_branches_where_its_decays_begin() -> None:
    stable = "train.learning_rate_decay=constant"
    trunk = checkpoint_of(quickstart(stable), 800)
    for steps in (900, 1000, 1500):
        decay = ["train.learning_rate_decay=linear", f"train.steps={steps}", f"train.decay_steps={steps - 800}"]
        require_same_schedule(trunk, quickstart(*decay))
        for floor in (0.0, 0.01, 0.1, 0.15, 0.7):  # 1 - x + x is not always 1
            cosine = ["train.learning_rate_decay=cosine", f"train.min_learning_rate_ratio={floor}"]
            require_same_schedule(trunk, quickstart(*decay, *cosine))
    require_same_schedule(trunk, quickstart(stable, "train.steps=5000"))
    require_same_schedule(trunk, quickstart(stable, "train.learning_rate=1e-3"))
    falling = "train.learning_rate={unit: steps, points: [[800, 0.006], [1100, 0.0]]}"
    require_same_schedule(trunk, quickstart(stable, falling))
    require_same_schedule(checkpoint_of(quickstart(stable, falling), 900), quickstart(stable, falling))
    with pytest.raises(
        UserError, match=r"learning_rate \(0.006 at 800.0 to 0.0 at 1100.0 steps there, 0.006 here\): at"
    ):
        require_same_schedule(checkpoint_of(quickstart(stable, falling), 900), quickstart(stable))
    with pytest.raises(
        UserError, match=r"learning_rate_decay \(constant there, cosine here\): at step 801 .* from 1 to"
    ):
        require_same_schedule(trunk, quickstart())


def test_rates_that_jump_are_a_named_choice() -> None:
    rising = checkpoint_of(quickstart(RISING), 220)
    with pytest.raises(
        UserError, match=r"has routing.cross_layer_prob 0.0 at 0.0 to 0.5 at 0.5 of the run, the config"
    ):
        require_same_schedule(rising, quickstart())
    allowed = quickstart("train.on_resume=other_schedule")
    require_same_schedule(rising, allowed)
    assert schedule_jumps(rising, allowed) == ["routing.cross_layer_prob from 0.2 to 0.5"]
    level = ["train.learning_rate_decay=constant", RISING]
    with pytest.raises(UserError, match=r"at step 221 that would move routing.cross_layer_prob from 0.2 to 0.1;"):
        require_same_schedule(checkpoint_of(quickstart(*level), 220), quickstart(*level, "train.steps=2200"))


def test_a_weight_of_distillation_that_jumps_is_a_named_choice() -> None:
    level = ["train.learning_rate_decay=constant", "distillation={teacher: self, weight: {points: [[0, 0], [1, 1]]}}"]
    trunk = checkpoint_of(quickstart(*level), 1100)
    with pytest.raises(UserError, match=r"at step 1101 that would move distillation\.weight from 1 to 0\.5;"):
        require_same_schedule(trunk, quickstart(*level, "train.steps=2200"))
    require_same_schedule(trunk, quickstart(*level, "train.steps=2200", "train.schedule_steps=1100"))
    without = quickstart(level[0], "train.steps=2200", "train.on_resume=other_schedule")
    assert schedule_jumps(trunk, without) == ["distillation.weight from 1 to 0"]


def test_a_learning_rate_begins_no_later_than_the_run() -> None:
    config = quickstart("train.learning_rate_from_step=600")
    require_begun(config, 600)
    with pytest.raises(
        UserError, match="learning_rate_from_step is 600, but the run goes on from step 0; give 0, or a"
    ):
        require_begun(config, 0)


def test_checkpoints_from_before_schedules_are_read() -> None:
    checkpoint = checkpoint_of(quickstart(), 600)
    new = {"learning_rate_decay", "decay_steps", "learning_rate_from_step", "schedule_steps"}
    old = StoredConfig.model_validate(
        {
            "model": checkpoint.config.model.model_dump(),
            "routing": checkpoint.config.routing.model_dump(exclude={"full_retention_share"}),
            "train": checkpoint.config.train.model_dump(exclude=new),
        }
    )
    require_same_schedule(cast(Checkpoint, SimpleNamespace(folder="CKPT", step=600, config=old)), quickstart())
