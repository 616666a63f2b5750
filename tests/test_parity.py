"""Every layout against the single-process reference: losses, every gradient, norm, weights, bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skvr_dist.parity.cases import CHECKPOINTING, LAYOUTS, POLICIES, Case, full_matrix, quick_matrix
from skvr_dist.parity.compare import Outcome, compare, expected
from skvr_dist.parity.matrix import run_matrix
from skvr_dist.parity.measure import run_case
from skvr_dist.parity.ranks import run_ranks

ROOT = Path(__file__).parent.parent


def by_layout(cases: list[Case]) -> dict[str, list[Case]]:
    return {layout: [case for case in cases if case.layout == layout] for layout in LAYOUTS}


def require_ok(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert not outcome.misses, outcome


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_quick_matrix(layout: str) -> None:
    """Under NCCL's rule of first use, which changes no figure: no layout's first step hangs on GPUs."""
    cases = by_layout(quick_matrix())[layout]
    outcomes = list(run_matrix(cases, first_use=True))
    assert len(outcomes) == len(cases) == 2
    require_ok(outcomes)


def test_every_policy_on_one_rank_and_on_four() -> None:
    names = ("single", "PP2xDP2 ZeRO-1")
    require_ok(list(run_matrix(Case(layout, policy, tied=True) for layout in names for policy in POLICIES)))


@pytest.mark.parametrize("layout", ["TP2xPP2", "PP2", "TP4 SP"])
def test_llama_with_biases(layout: str) -> None:
    require_ok(list(run_matrix([Case(layout, family="llama", tied=layout == "PP2")])))


@pytest.mark.parametrize("layout", ["DP2 ZeRO-1", "PP2xDP2 ZeRO-1", "DP2 ZeRO-2", "PP2xDP2 ZeRO-3", "TP2 SP"])
def test_bf16_follows_fp32_and_keeps_its_state_in_fp32(layout: str) -> None:
    case = Case(layout, tied=True, precision="bf16")
    results = run_ranks(LAYOUTS[layout].ranks, run_case, case)
    for result in results:
        assert {tensor.dtype for _, tensor in result.weights.values()} == {torch.bfloat16}
        assert {tensor.dtype for _, tensor in result.gradients.values()} == {torch.float32}
        assert result.state_dtypes == {torch.float32}
    require_ok([compare(case, results)])


def test_the_comparison_sees_a_wrong_gradient() -> None:
    """A relative error of 1e-4 in one gradient of one rank, and a rank that holds a byte too much for its share."""
    case = Case("DP2 ZeRO-1")
    results = run_ranks(2, run_case, case)
    assert not compare(case, results).misses
    results[1].gradients["layers.2.self_attn.k_proj.weight"][1].mul_(1 + 1e-4)
    results[1].bytes["optimizer"] *= 2
    outcome = compare(case, results)
    assert outcome.misses == ["gradient", "bytes of optimizer"]
    assert outcome.worst_gradient == "layers.2.self_attn.k_proj.weight"
    assert outcome.bytes_ratio["optimizer"] == pytest.approx(2.0, rel=0.05)


def test_the_reference_is_that_of_a_plain_decoder() -> None:
    """Without routing the policies agree with one another; with it they do not."""
    none, uniform = (expected("qwen3", False, policy, 2)["losses"] for policy in ("none", "uniform"))
    assert none[0] != uniform[0]


def test_the_full_matrix_has_every_combination() -> None:
    cases = full_matrix()
    assert len(set(cases)) == len(cases)
    seen = {(case.layout, case.policy, case.checkpointing) for case in cases}
    assert seen == {
        (layout, policy, kind)
        for layout in LAYOUTS
        for policy in ("none", "uniform", "strategy")
        for kind in CHECKPOINTING
    }
    assert {(case.layout, case.tied) for case in cases} == {
        (layout, tied) for layout in LAYOUTS for tied in (True, False)
    }
    assert {case.layout for case in cases if case.steps == 20} == set(LAYOUTS)


def parity(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "tools/parity.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command(tmp_path: Path) -> None:
    output = parity("--layout", "single", "--json", str(tmp_path / "parity.json"))
    assert "2 cases in " in output and "0 out of tolerance" in output
    outcomes = json.loads((tmp_path / "parity.json").read_text())
    assert [outcome["case"]["layout"] for outcome in outcomes] == ["single", "single"]
    assert "no layout of the quick matrix has 'TP3' in its name" in parity("--layout", "TP3", code=2)


def test_the_support_matrix_is_printed() -> None:
    output = parity("--support")
    assert "|      2 | yes                 | yes                 | no               | no               |" in output
    assert "parallel.zero_stage 2 under a pipeline" in output
