"""Closed forms of memory, traffic and time: what they say is what virtual ranks of the real engine do."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.programs import run_here

from skvr_dist.command import parse
from skvr_dist.commands.estimate import train
from skvr_dist.commands.verify import estimate as verify_estimate
from skvr_dist.config.load import validate_config
from skvr_dist.errors import UserError
from skvr_dist.lab.estimate import check
from skvr_dist.lab.estimate.check import CASES, Case, Comparison, compare
from skvr_dist.lab.estimate.layout import estimate
from skvr_dist.lab.estimate.page import command, section
from skvr_dist.lab.estimate.propose import propose, require_any
from skvr_dist.lab.estimate.rank import RankSizes
from skvr_dist.lab.estimate.speed import PRESETS
from skvr_dist.lab.virtual.memory import LiveMemory
from skvr_dist.model.arena import ArenaGradients, StageArena
from skvr_dist.train.plans import plan_of_step

ROOT = Path(__file__).parents[2]
CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["TP2 SP x PP2, bf16", "PP2 x DP2, ZeRO-3", "DP4, ZeRO-2, bf16, 8 tokens"])
def test_closed_forms_are_what_virtual_ranks_do(name: str) -> None:
    """All configurations are compared by `tools/verify.py estimate`."""
    for each in compare(CASE[name]):
        assert each.differing == [] and each.traffic
        assert abs(each.error) <= check.MEMORY_BOUND, each


def test_as_many_slots_are_counted_as_an_arena_has() -> None:
    rank = RankSizes(CASE["PP4 x DP4, ZeRO-1, from an arena"].config(), 16, 2)
    plan = plan_of_step(rank.config, 0)
    found = [row.slots for row in rank.rows(plan)]
    made = [
        StageArena(rank.layers, row.donors, 2, torch.device("cpu"), None, ArenaGradients()).slots
        for row in rank.rows(plan)
    ]
    assert found == made and len({*found}) > 1


def test_an_error_of_the_forms_is_a_miss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of bytes, and of memory."""
    right = Comparison("one", 0, 100, 100, "update", {("tensor", "all_reduce"): 8}, [])
    wrong = [
        dataclasses.replace(right, differing=["tensor all_reduce: 8 bytes, 9 measured"]),
        dataclasses.replace(right, estimated_bytes=94),
        dataclasses.replace(right, estimated_bytes=106),
    ]
    for each, code in [(right, 0), *((each, 1) for each in wrong)]:
        assert each.is_met == (code == 0)
        monkeypatch.setattr(check, "compare", lambda case, each=each: [each])
        assert verify_estimate.run(argparse.Namespace(only="single", json=None)) == code
    assert "9 measured" in capsys.readouterr().out


def test_live_memory_follows_storages_to_their_end() -> None:
    with LiveMemory() as memory:
        kept = torch.zeros(100)
        view = kept.view(10, 10)[2:]
        torch.zeros(50).add(1)  # two tensors, gone at once
        assert (memory.held, memory.peak) == (400, 800)
        memory.reset_peak()
        del kept
        assert memory.held == 400  # the view holds all of it
        torch.zeros(1000, device="meta")
        del view
        assert (memory.held, memory.peak) == (0, 400)


def test_the_slowest_stage_and_the_bubble_make_the_time() -> None:
    config = Case("", 8, {"pipeline": 4}).config()
    whole = estimate(config, 8, PRESETS["h100"])
    assert whole.speed.bubble == pytest.approx(3 / (8 + 3))
    faster = estimate(config, 8, dataclasses.replace(PRESETS["h100"], tflops=2 * 989, efficiency=0.3))
    assert faster.speed.step_seconds == pytest.approx(whole.speed.step_seconds)
    assert faster.speed.mfu == pytest.approx(whole.speed.mfu / 2)


def test_proposals_are_ranked_and_say_why() -> None:
    config = Case("", 8, {"pipeline": 4}).config()
    rates = dataclasses.replace(PRESETS["h100"], memory_gib=0.009)
    found = propose(config, 8, rates)
    fits = [each.gib <= rates.memory_gib for each in found]
    assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits)
    times = [each.estimate.speed.step_seconds for each in found if each.gib <= rates.memory_gib]
    assert times == sorted(times)
    assert found[0].why == "the fastest that fits" and "does not fit: " in found[-1].why
    with pytest.raises(UserError, match=r"no layout of --gpus 8 fits in 0\.001 GiB: the smallest .* more; use more"):
        require_any(found, dataclasses.replace(rates, memory_gib=0.001))


@pytest.mark.parametrize(
    ("gpus", "parallel", "zero", "sentence"),
    [
        (12, {"pipeline": 4}, {}, r"--gpus 12 cannot be laid out .*; the nearest that can: 8 and 16"),
        (1024, {"pipeline": 4}, {}, r"the nearest that can: 64$"),
        (2, {"pipeline": 4}, {}, r"the nearest that can: 4$"),
        (4, {"pipeline": 4}, {"offload_optimizer": {"device": "cpu"}}, r"offload_optimizer has no estimate yet"),
    ],
)
def test_what_cannot_be_estimated_is_refused(gpus: int, parallel: dict, zero: dict, sentence: str) -> None:
    config = Case("", gpus, parallel, zero=zero).config()
    with pytest.raises(UserError, match=sentence):
        estimate(config, gpus, PRESETS["h100"])


def test_eager_attention_is_refused() -> None:
    raw = Case("", 1).config().model_dump()
    raw["model"]["attention"] = "eager"
    with pytest.raises(UserError, match="eager keeps all scores"):
        estimate(validate_config(raw), 1, PRESETS["h100"])


@pytest.mark.parametrize("option", ["--tflops", "--link-gbps", "--network-gbps", "--efficiency", "--memory-gib"])
@pytest.mark.parametrize("value", ["0", "nan", "x"])
def test_rates_of_zero_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        parse(parser, ["--config", "quickstart", "--gpus", "2", option, value])
    assert ended.value.code == 2 and option in capsys.readouterr().err


def test_the_command(tmp_path: Path) -> None:
    command = ["tools/estimate.py", "train", "--config", "quickstart", "--config", "qwen3-1.7b"]
    command += ["parallel.pipeline=2", "--gpus", "8", "--gpu", "h200", "--json", str(tmp_path / "estimate.json")]
    printed = run_here(*command)
    assert "worst rank: stage " in printed and "predicted, not measured: step " in printed
    record = json.loads((tmp_path / "estimate.json").read_text())
    assert [stage["stage"] for stage in record["stages"]] == [0, 1]


def test_the_page_of_layouts_is_made_by_its_commands() -> None:
    """One model and size; the others are made alike, by `make docs`."""
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    lines = section("qwen3-1.7b", (8,)).splitlines()
    row, keys = (next(line for line in lines if line.startswith(start)) for start in ("|      8 |", "* 8 GPUs"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells in [[cell.strip() for cell in line.split("|")] for line in page.splitlines()]
    assert keys in page and f"    {command('qwen3-1.7b', 8)}" in page
