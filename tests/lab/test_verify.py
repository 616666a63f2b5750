"""Every layout against the single-process reference: losses, every gradient, norm, weights, bytes."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.programs import run_here

from skvr_dist.lab.verify import reference
from skvr_dist.lab.verify.cases import (
    BF16,
    CHECKPOINTING,
    LAYOUTS,
    POLICIES,
    VARIATIONS,
    Case,
    full_matrix,
    quick_matrix,
    varied,
)
from skvr_dist.lab.verify.compare import Outcome, compare, expected, gradient_scales, tolerance_of
from skvr_dist.lab.verify.matrix import run_matrix
from skvr_dist.lab.verify.measure import RankResult, run_case
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.routing import plan


def by_layout(cases: list[Case]) -> dict[str, list[Case]]:
    return {layout: [case for case in cases if case.layout == layout] for layout in LAYOUTS}


def require_ok(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert not outcome.misses, outcome


@pytest.mark.parametrize("layout", [layout for layout, cases in by_layout(quick_matrix()).items() if cases])
def test_the_quick_matrix(layout: str) -> None:
    """Under NCCL's rule of first use, which changes no figure: no layout's first step hangs on GPUs."""
    cases = by_layout(quick_matrix())[layout]
    outcomes = list(run_matrix(cases, first_use=True))
    assert len(outcomes) == len(cases) >= (1 if LAYOUTS[layout].brief else 2)
    require_ok(outcomes)


def test_every_policy_on_one_rank_and_on_four() -> None:
    names = ("single", "PP2xDP2 ZeRO-1")
    require_ok(list(run_matrix(Case(layout, policy, tied=True) for layout in names for policy in POLICIES)))


@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2", "TP4 SP"])
def test_llama_with_biases(layout: str) -> None:
    require_ok(list(run_matrix([Case(layout, family="llama", tied=layout == "PP2")])))


@pytest.mark.parametrize("layout", ["DP2 ZeRO-1", "PP2xDP2 ZeRO-1", "DP2 ZeRO-2", "PP2xDP2 ZeRO-3"])
def test_bf16_follows_fp32_and_keeps_its_state_in_fp32(layout: str) -> None:
    case = Case(layout, tied=True, **BF16)
    results = run_ranks(LAYOUTS[layout].ranks, run_case, case)
    for result in results:
        assert {tensor.dtype for _, tensor in result.weights.values()} == {torch.bfloat16}
        assert {tensor.dtype for _, tensor in result.gradients[0].values()} == {torch.float32}
        if layout.endswith("ZeRO-1"):  # they were added up in fp32, over replicas too
            read_once = ("k_proj", "v_proj", "k_norm")  # by a single micro-batch: then there is nothing to add up
            summed = [g for name, (_, g) in result.gradients[0].items() if not any(part in name for part in read_once)]
            assert len(summed) > 10 and all(not torch.equal(g, g.bfloat16().float()) for g in summed)
        assert result.state_dtypes == {torch.float32}
    require_ok([compare(case, results)])


@pytest.mark.parametrize("layout", ["PP2xDP2 ZeRO-1", "TP2xDP2 ZeRO-3", "PP2xDP2 ZeRO-3 offload"])
def test_ragged_labels(layout: str) -> None:
    """Micro-batches and replicas differ in how many labels they have; the reference knows of neither."""
    require_ok(list(run_matrix([Case(layout, ragged=True)])))


@pytest.mark.parametrize("layout", ["PP2xDP2 ZeRO-1 offload", "DP2 ZeRO-2 offload"])
def test_ragged_labels_in_bf16(layout: str) -> None:
    require_ok(list(run_matrix([Case(layout, ragged=True, tied=True, **BF16)])))


@functools.cache
def fp32_results() -> tuple[Case, list[RankResult]]:
    case = Case("DP2 ZeRO-1")
    return case, run_ranks(2, run_case, case)


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """An error of 1e-4 in one gradient and of 1e-5 in an evaluation, and twice a share of bytes, on one rank."""
    case, results = fp32_results()
    assert not compare(case, results).misses
    results = copy.deepcopy(results)
    results[1].gradients[0]["layers.2.self_attn.k_proj.weight"][1].mul_(1 + 1e-4)
    results[1].evaluation = (results[1].evaluation or 0.0) * (1 + 1e-5)
    results[1].bytes["optimizer"] *= 2
    outcome = compare(case, results)
    assert outcome.misses == ["evaluation", "gradient", "bytes of optimizer"]
    assert outcome.worst_gradient == "layers.2.self_attn.k_proj.weight"
    assert outcome.bytes_ratio["optimizer"] == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_comparison_sees_what_is_not_a_number(rank: int) -> None:
    """On either rank: no comparison with it is true."""
    case, results = fp32_results()
    name = "layers.2.mlp.up_proj.weight"
    broken = copy.deepcopy(results)
    broken[rank].losses[1] = broken[rank].norms[1] = math.nan
    assert compare(case, broken).misses == ["loss", "gradient norm"]
    for figure, held in (("gradient", lambda r: r.gradients[0]), ("later gradients", lambda r: r.gradients[1])):
        broken = copy.deepcopy(results)
        held(broken[rank])[name][1][0, 0] = math.nan
        assert {figure, "gradient scale"} <= set(compare(case, broken).misses)
    broken = copy.deepcopy(results)
    broken[rank].initial[name][1][0, 0] = broken[rank].weights[name][1][0, 0] = math.nan
    assert {"initial weights", "weights"} <= set(compare(case, broken).misses)


def draw_wrongly(patch: pytest.MonkeyPatch, of: str) -> None:
    """Draw donors, or initial weights, by a rule of the same distribution that is not the published one.

    Or read schedules a step late.
    """
    value_at, donors, normal = plan.value_at, plan.draw_donors, torch.Tensor.normal_
    if of == "donors":
        patch.setattr(plan, "draw_donors", lambda routing, coin, pick, prob: donors(routing, coin, 1 - pick, prob))
    elif of == "rates":
        patch.setattr(plan, "value_at", lambda value, step, steps: value_at(value, step - 1, steps))
    else:

        def upside_down(*args: Any, **kwargs: Any) -> torch.Tensor:
            drawn = normal(*args, **kwargs)
            return drawn.copy_(drawn.flip(0))

        patch.setattr(torch.Tensor, "normal_", upside_down)


def with_a_wrong_draw(case: Case, of: str) -> RankResult:
    with pytest.MonkeyPatch.context() as patch:
        draw_wrongly(patch, of)
        return run_case(case)


@pytest.mark.parametrize(("of", "figure"), [("donors", "donors"), ("rates", "donors"), ("weights", "initial weights")])
def test_the_comparison_sees_a_wrong_draw(of: str, figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where everything but the reference draws wrongly: it draws for itself."""
    case = Case("single", **VARIATIONS["schedules"])
    results = run_ranks(1, with_a_wrong_draw, case, of)
    expected.cache_clear()
    draw_wrongly(monkeypatch, of)
    misses = compare(case, results).misses
    expected.cache_clear()
    assert figure in misses and "loss" in misses


@functools.cache
def bf16_results() -> tuple[Case, list[RankResult]]:
    case = Case("TP2 SP", "strategy", tied=True, **BF16)
    return case, run_ranks(2, run_case, case)


@pytest.mark.parametrize("error", [1.03, 0.97])
def test_the_comparison_sees_an_error_of_three_percent_in_bf16(error: float) -> None:
    """In the gradient of any one weight, whole or a shard, on one of the ranks."""
    case, results = bf16_results()
    assert not compare(case, results).misses
    scaled = copy.deepcopy(results)
    for gradients in scaled[1].gradients:
        for _, gradient in gradients.values():
            gradient.mul_(error)
    steps = expected(case.on_one_rank)["gradients"]
    scales = gradient_scales([[result.gradients[step] for result in scaled] for step in range(case.steps)], steps)
    assert len(scales) > 50 and min(scales.values()) > tolerance_of(case).gradient_scale
    scaled = copy.deepcopy(results)
    for gradients in scaled[1].gradients:
        gradients["layers.2.self_attn.k_norm.weight"][1].mul_(error)
    misses = compare(case, scaled).misses
    assert "gradient scale" in misses and "gradient" not in misses  # by the size of single errors it would pass


def test_the_comparison_sees_an_update_that_is_three_percent_off_in_bf16() -> None:
    """As by another learning rate; and weights that are not those of the optimizer."""
    case, results = bf16_results()
    initial = expected(case.on_one_rank)["initial"]
    wrong = copy.deepcopy(results)
    shard, master = wrong[0].masters["layers.2.mlp.up_proj.weight"]
    master.add_(0.03 * (master - shard.cut(initial["layers.2.mlp.up_proj.weight"])))
    assert "update" in compare(case, wrong).misses
    stale = copy.deepcopy(results)
    stale[1].weights["norm.weight"][1].mul_(1 + 2**-7)
    assert compare(case, stale).misses == ["rounded weights"]


def with_another_eps(case: Case) -> RankResult:
    """A case on a rank whose AdamW has an eps of 1e-6 for 1e-8."""
    config = case.config()
    wrong = config.model_copy(update={"train": config.train.model_copy(update={"adam_eps": 1e-6})})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "config", lambda case: wrong)
        return run_case(case)


def test_the_comparison_sees_another_eps() -> None:
    """Where it is as small as usual."""
    case = Case("single", family="llama", **VARIATIONS["usual eps"])
    assert "update" in compare(case, run_ranks(1, with_another_eps, case)).misses


def test_every_variation_changes_the_training() -> None:
    """So none of them is compared with itself."""
    plain = Case("single")
    losses = {name: tuple(expected(varied(plain, name))["losses"]) for name in VARIATIONS if name != "bf16"}
    losses["plain"] = tuple(expected(plain)["losses"])
    assert len(set(losses.values())) == len(losses)
    assert expected(plain)["losses"][0] != expected(Case("single", "none"))["losses"][0]


def test_the_reference_reads_the_scaled_frequencies_that_are_published() -> None:
    """Llama 3.1's: kept, interpolated and stretched. The interpolated one is worked out by hand."""
    found = reference.frequencies(Case("single", rope_scaling=True).shape)
    smooth = (128 / (2 * math.pi / 0.1) - 1) / 3
    assert found.tolist() == pytest.approx([1.0, 0.1 * ((1 - smooth) / 8 + smooth), 0.01 / 8, 0.001 / 8], rel=1e-6)


def test_the_full_matrix_has_every_combination() -> None:
    cases = full_matrix()
    whole = [layout for layout in LAYOUTS if not LAYOUTS[layout].brief]
    assert len(set(cases)) == len({case.name for case in cases}) == len(cases)
    seen = {(case.layout, case.policy, case.checkpointing) for case in cases if case.layout in whole}
    assert seen == {
        (layout, policy, kind)
        for layout in whole
        for policy in ("none", "uniform", "strategy")
        for kind in CHECKPOINTING
    }
    assert {(case.layout, case.tied) for case in cases} == {
        (layout, tied) for layout in LAYOUTS for tied in (True, False)
    }
    assert {case.layout for case in cases if case.steps == 20} == set(whole)
    assert {case.layout for case in cases if case.family == "qwen2"} == set(whole)
    for layout in whole:
        also = [set(case.also) for case in cases if case.layout == layout]
        for name in VARIATIONS:
            case = varied(Case(layout), name)
            assert set(case.also) in also, f"{name} on {layout}"
    assert {case.layout for case in cases if case.precision == "bf16"} == {
        layout for layout in LAYOUTS if varied(Case(layout), "bf16").precision == "bf16"
    }
    assert {case.layout for case in cases if LAYOUTS[case.layout].ranks == 16} == {"TP4xPP2xDP2", "PP4xDP4"}


def test_the_quick_matrix_has_every_variation() -> None:
    cases = quick_matrix()
    assert len(set(cases)) == len(cases)
    also = [set(case.also) for case in cases]
    assert all(set(varied(Case("DP2 ZeRO-1"), name).also) in also for name in VARIATIONS)


def verify_layouts(*arguments: str, code: int = 0) -> str:
    return run_here("tools/verify.py", "layouts", *arguments, code=code)


def test_the_command(tmp_path: Path) -> None:
    output = verify_layouts("--layout", "single", "--json", str(tmp_path / "parity.json"))
    assert "2 cases in " in output and "0 out of tolerance" in output
    outcomes = json.loads((tmp_path / "parity.json").read_text())
    assert [outcome["case"]["layout"] for outcome in outcomes] == ["single", "single"]
    assert "no layout of the quick matrix has 'TP3' in its name" in verify_layouts("--layout", "TP3", code=2)


def test_the_command_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    names = verify_layouts("--only", "^single,", "--list").splitlines()
    assert len(names) == 2
    assert "1 cases in " in verify_layouts("--only", re.escape(names[0]) + "$", "--json", str(file))
    before = json.loads(file.read_text())
    assert "2 cases (1 kept) in " in verify_layouts("--only", "^single,", "--json", str(file), "--resume")
    after = json.loads(file.read_text())
    assert after[:1] == before and len(after) == 2
    file.write_text(json.dumps([{"case": {"layout": "single"}}]))
    assert "does not hold outcomes of this version" in verify_layouts("--resume", "--json", str(file), code=2)
    assert "no case of the quick matrix has 'TP3' in its name" in verify_layouts("--only", "TP3", code=2)
    assert "'(' is not a regular expression" in verify_layouts("--only", "(", code=2)
    assert "--resume needs --json FILE" in verify_layouts("--resume", code=2)


def test_a_matrix_with_another_policy_family_or_attention() -> None:
    shown = verify_layouts("--set", "policy=window", "--set", "attention=eager", "--layout", "single", "--list")
    names = [name.split(", ") for name in shown.splitlines()]
    assert len(names) == 2 and all(name[1] == "window" and "attention eager" in name for name in names)
    refused = verify_layouts("--set", "policy=windows", code=2)
    assert "error: --set policy=windows is not one of policy=none, uniform" in refused
    assert "--set clip=0 is not one of" in verify_layouts("--set", "clip=0", code=2)


def test_the_support_matrix_is_printed() -> None:
    output = verify_layouts("--support")
    assert "|      2 | yes                 | yes                 | no               | no               |" in output
    assert "parallel.zero_stage 2 under a pipeline" in output
