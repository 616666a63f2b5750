"""Figures of experiments: what their tables say of results that were made up, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skvr_dist.commands.plot import run
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy
from skvr_dist.sweep.experiment import read_experiment
from skvr_dist.sweep.figures.build import FIGURES
from skvr_dist.sweep.figures.draw import Figure
from skvr_dist.sweep.figures.read import read_methods
from skvr_dist.sweep.figures.statistics import Mean, fit_sizes, paired
from skvr_dist.sweep.plan import PlannedRun, plan_runs

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "configs/experiment/sweeps"
Loss = Callable[[PlannedRun, float], float]


def made_up(run: PlannedRun, retention: float) -> float:
    """A loss: standard models suffer from thin caches, routed ones at full retention, shallow ones in any case."""
    model = run.config.model
    base = 2.0 + 4.0 / model.num_hidden_layers**0.5 + 20.0 * model.hidden_size**-1.0
    price = 1.2 * (1 - retention) if run.config.routing.policy == "none" else 0.1 + 0.2 * (1 - retention)
    return base + price + 0.02 * (run.config.train.seed - 1)


def results(folder: Path, experiment: str, loss: Loss = made_up) -> Path:
    """results.jsonl of an experiment of the project whose runs have all finished."""
    lines = []
    for planned in plan_runs(read_experiment(SWEEPS / f"{experiment}.yaml")):
        config, layers = planned.config, planned.config.model.num_hidden_layers
        strategies = CacheStrategy.parse_all(config.evaluate.strategies, layers)
        held_out = {name: loss(planned, strategy.retention) for name, strategy in strategies.items()}
        steps = [config.train.steps // 2, config.train.steps]
        line = {
            "name": planned.name,
            "seed": config.train.seed,
            "state": "finished",
            "tokens": config.train.steps * config.train.global_batch_size * config.data.sequence_length,
            "held_out": held_out,
            "held_out_by_step": [[step, {k: v * (2 - step / steps[1]) for k, v in held_out.items()}] for step in steps],
            "retention": {name: strategy.retention for name, strategy in strategies.items()},
            "config": config.model_dump(),
        }
        lines.append(json.dumps(line))
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "results.jsonl"


def figure_of(name: str, *files: Path) -> Figure:
    figure = FIGURES[name](read_methods(files)[0])
    assert figure is not None
    return figure


def rows_of(figure: Figure, *first: str) -> list[list[str]]:
    return [row for row in figure.rows if tuple(row[: len(first)]) == first]


def test_deep_and_shared_against_shallow(tmp_path: Path) -> None:
    figure = figure_of("cache", results(tmp_path / "shallow", "shallow"))
    shared, prefixes = figure.panels
    assert [series.label for series in shared.series] == ["rise-8", "standard models of fewer layers"]
    assert [series.label for series in prefixes.series] == ["rise-8", "standard models of fewer layers"]
    deep, shallow = shared.series
    assert deep.x == [256, 512, 768, 1024, 2048] and shallow.x == [2048, 1536, 1024, 768, 512, 256]
    assert rows_of(figure, "standard-4") == [["standard-4", "4", "full", "1,024", "4.1562 ± 0.0497", "3"]]


def test_the_price_of_retention_is_taken_seed_by_seed(tmp_path: Path) -> None:
    figure = figure_of("retention", results(tmp_path / "baselines", "baselines"))
    assert [panel.title.split()[-4] for panel in figure.panels] == ["layer", "layers"]
    [half] = rows_of(figure, "rise", "every:2")
    standard = [2 + 4 / 8**0.5 + 20 / 128 + 0.02 * (seed - 1) for seed in range(3)]
    own = Mean.of([100 * ((loss + 0.2) / (loss + 0.1) - 1) for loss in standard])
    assert half[2:5] == [
        "50 %",
        str(Mean.of([loss + 0.2 for loss in standard])),
        f"{own.value:+.2f} ± {own.half:.2f} %",
    ]
    assert [row[1] for row in rows_of(figure, "cla-2")] == ["every:2", "every:4", "every:8"]
    assert rows_of(figure, "cla-2", "every:2")[0][4] == ""  # it has no full retention of its own
    assert rows_of(figure, "standard", "full")[0][5] == "+0.00 ± 0.00 %"


def test_curves_are_over_tokens(tmp_path: Path) -> None:
    figure = figure_of("curves", results(tmp_path / "recipes", "recipes"))
    assert [panel.title for panel in figure.panels] == [
        f"cache strategy {s}" for s in ("full", "every:2", "every:3", "every:4")
    ]
    assert [row[2:4] for row in rows_of(figure, "constant-16", "full")] == [["137", "561,152"], ["275", "1,126,400"]]


def test_a_branch_of_other_sequences_has_its_trunks_tokens_before(tmp_path: Path) -> None:
    file = results(tmp_path / "recipes", "recipes")
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**line, "tokens": line["tokens"] - 2048}) + "\n" for line in lines))
    rows = rows_of(figure_of("curves", file), "constant-16", "full")
    assert [row[3] for row in rows] == ["559,104", "1,124,352"]


def test_sizes_are_fitted_with_intervals(tmp_path: Path) -> None:
    figure = figure_of("scaling", results(tmp_path / "scaling", "scaling"))
    labels = {series.label for panel in figure.panels for series in panel.series}
    assert labels == {"standard", "rise"} and len(figure.panels) == 5
    assert [row[2] for row in rows_of(figure, "rise", "full")] == ["329,280", "1,247,872", "4,854,528", "fit"]
    assert "ln N" in rows_of(figure, "rise", "full")[-1][3] and "fewer than 4 sizes" in figure.notes[1]
    assert rows_of(figure, "standard", "full")[0][4] == "+0.00 ± 0.00 %"
    twice = figure_of("scaling", tmp_path / "scaling/results.jsonl", results(tmp_path / "baselines", "baselines"))
    sizes = {row[2] for row in twice.rows if row[1] == "full"}
    assert sizes == {"329,280", "1,247,872", "4,854,528", "fit"}
    assert FIGURES["scaling"](read_methods([results(tmp_path / "recipes", "recipes")])[0]) is None


def test_what_has_draws_in_common_makes_a_recipe(tmp_path: Path) -> None:
    """A draw for each sequence is the same in micro-batches of any size."""
    [rise] = [m for m in read_methods([results(tmp_path / "recipes", "recipes")])[0] if m.label == "rise"]

    def recipe(micro_batch_size: int, **routing: object) -> str:
        config = {**rise.config, "train": {**rise.config["train"], "micro_batch_size": micro_batch_size}}
        config["routing"] = {**rise.config["routing"], **routing}
        return replace(rise, runs=({**rise.runs[0], "config": config},)).recipe

    assert recipe(1) == recipe(4, draws_per="sequence") != recipe(4)
    assert recipe(1, policy="none") == recipe(4, policy="none") != recipe(1)


def test_fits_find_what_was_put_in() -> None:
    generator = np.random.default_rng(0)
    sizes = [10**5, 10**6, 10**7, 10**8]
    fit = fit_sizes({n: (1.5 + 30 * n**-0.25 + generator.normal(0, 1e-3, 5)).tolist() for n in sizes})
    assert fit.form == "power" and fit.intervals is not None
    for value, (low, high), true in zip(fit.parameters, fit.intervals, (1.5, 30, 0.25), strict=True):
        assert low - 1e-9 <= true <= high + 1e-9 and value == pytest.approx(true, rel=0.1)
    line = fit_sizes({n: [5 - 0.2 * np.log(n)] for n in sizes[:3]})
    assert line.form == "log" and line.parameters == pytest.approx((5, -0.2)) and line.intervals is None


def test_means_and_intervals() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert mean.value == 2 and mean.half == pytest.approx(4.303 / 3**0.5)
    assert str(Mean.of([2.5])) == "2.5000"
    price = paired({0: 2.2, 1: 9.0}, {0: 2.0, 2: 1.0})
    assert price is not None and price.value == pytest.approx(10.0) and price.count == 1
    assert paired({0: 1.0}, {}) is None


def test_the_same_run_in_two_experiments_is_one_method(tmp_path: Path) -> None:
    files = [results(tmp_path / "recipes", "recipes"), results(tmp_path / "longer", "longer")]
    labels = [method.label for method in read_methods(files)[0]]
    assert "recipes/standard" in labels and "longer/standard" in labels and "constant-4" in labels
    again = results(tmp_path / "again", "recipes")
    assert len(read_methods([files[0], again])[0]) == len(read_methods(files[:1])[0])


def changed(file: Path, place: Path, **changes: Callable[[Any], Any]) -> Path:
    """Results with some values of each line made anew from the line."""
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    place.parent.mkdir(exist_ok=True)
    made = [line | {key: change(line) for key, change in changes.items()} for line in lines]
    place.write_text("".join(json.dumps(line) + "\n" for line in made))
    return place


def test_runs_are_counted_once_and_kept_apart(tmp_path: Path) -> None:
    file = results(tmp_path / "recipes", "recipes")
    seeds = [len(method.runs) for method in read_methods([file])[0]]
    assert [len(method.runs) for method in read_methods([file, file])[0]] == seeds
    others = changed(file, tmp_path / "copied/recipes.jsonl", seed=lambda line: line["seed"] + 2)  # of 2, 3 and 4
    others = changed(others, others, name=lambda line: line["name"][:-1] + str(line["seed"]))
    assert [len(method.runs) for method in read_methods([file, others])[0]] == [5] * len(seeds)
    (tmp_path / "other").mkdir()
    longer = results(tmp_path / "other/recipes", "longer")
    labels = [method.label for method in read_methods([file, longer])[0]]
    assert f"{tmp_path.name}/recipes/standard" in labels and "other/recipes/standard" in labels
    beside = changed(longer, file.with_name("longer.jsonl"))
    assert "longer.jsonl/standard" in [method.label for method in read_methods([file, beside])[0]]


def test_an_experiment_of_nothing_but_seeds_is_one_method(tmp_path: Path) -> None:
    file = results(tmp_path / "recipes", "recipes")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines() if '"name": "standard_' in line))
    [method] = read_methods([changed(file, file, name=lambda line: f"seed-{line['seed']}")])[0]
    assert method.label == "recipes" and len(method.runs) == 3


def test_a_run_whose_loss_is_no_number_is_left_out(tmp_path: Path) -> None:
    file = results(tmp_path / "recipes", "recipes")
    bad = changed(
        file, file, held_out=lambda line: line["held_out"] | ({"full": None} if line["name"] == "rise_seed-0" else {})
    )
    methods, left_out = read_methods([bad])
    assert left_out == ["Left out, for a held-out loss that is no number: rise_seed-0."]
    assert {method.label: len(method.runs) for method in methods}["rise"] == 2
    bad = changed(file, file, held_out=lambda line: {"full": None})
    with pytest.raises(UserError, match=r"the held-out loss of .*rise_seed-0.* is no number; give results of others"):
        read_methods([bad])


@pytest.mark.parametrize("names", [["0,1", "0"], ["prefix:2", "prefix:1"], ["even:1"], ["full"]])
def test_every_figure_has_something_to_show(tmp_path: Path, names: list[str]) -> None:
    def renamed(losses: dict[str, float]) -> dict[str, float]:
        return dict(zip(names, losses.values(), strict=False))

    file = results(tmp_path / "recipes", "recipes")
    file = changed(
        file,
        file,
        held_out=lambda line: renamed(line["held_out"]),
        retention=lambda line: renamed(line["retention"]),
        held_out_by_step=lambda line: [[step, renamed(losses)] for step, losses in line["held_out_by_step"]],
    )
    for name in ("cache", "retention", "curves"):
        figure = figure_of(name, file)
        assert all(panel.series for panel in figure.panels) and figure.panels
    # An evaluation that some seed has no loss of is not in the curves.
    file = changed(file, file, held_out_by_step=lambda line: [[line["seed"] + 1, line["held_out"]]])
    assert not figure_of("curves", file).panels


def test_models_of_fewer_layers_alone_are_a_figure(tmp_path: Path) -> None:
    methods = read_methods([results(tmp_path / "shallow", "shallow")])[0]
    figure = FIGURES["cache"]([method for method in methods if method.is_standard])
    assert figure is not None and [len(panel.series) for panel in figure.panels] == [1]


def test_the_command_writes_pictures_pages_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = results(tmp_path / "shallow", "shallow")
    with file.open("a") as more:
        more.write(
            json.dumps({**json.loads(file.read_text().splitlines()[0]), "name": "late", "state": "failed"}) + "\n"
        )

    def plot(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["skvr-plot", *words, "--output", f"{tmp_path}/figures"])
        run()
        return capsys.readouterr().out

    assert "Not finished, and left out: late." in plot(str(file), "--figure", "cache", "--format", "svg")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"cache.svg", "cache.md", "cache.json"}
    assert "standard models of fewer layers" in (tmp_path / "figures/cache.svg").read_text()
    record: Any = json.loads((tmp_path / "figures/cache.json").read_text())
    assert record["panels"][0]["series"][0]["x"] == [256, 512, 768, 1024, 2048]
    for words, sentence in (
        ([f"{tmp_path}/none.jsonl"], "cannot read .*none.jsonl"),
        (
            [str(ROOT / "pyproject.toml")],
            r"pyproject.toml, line 1 is no result of a sweep \(it has no JSON\); give the",
        ),
        ([str(file), "--method", "rize"], "--method rize has no finished run; there are rise-8, standard-8"),
        (
            [str(results(tmp_path / "r", "recipes")), "--figure", "scaling"],
            "--figure scaling needs a recipe with models",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            plot(*words)
    (tmp_path / "begun.jsonl").write_text(
        json.dumps({**json.loads(file.read_text().splitlines()[0]), "state": "failed"})
    )
    with pytest.raises(UserError, match=r"begun.jsonl holds no finished run that was evaluated"):
        plot(f"{tmp_path}/begun.jsonl")
