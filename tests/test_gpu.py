"""Parity with the single-process reference on a GPU: `python -m pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from skvr_dist.model.attention import flash_is_installed
from skvr_dist.parallel.launcher import start_process_group
from skvr_dist.parity.cases import Case
from skvr_dist.parity.compare import compare
from skvr_dist.parity.measure import run_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """This process alone, on its GPU."""
    start_process_group()
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", ["none", "uniform", "strategy"])
@pytest.mark.parametrize(("precision", "attention"), [("fp32", "sdpa"), ("bf16", "sdpa"), ("bf16", "flash")])
def test_one_gpu_follows_the_reference(policy: str, precision: str, attention: str) -> None:
    if attention == "flash" and not flash_is_installed():
        pytest.skip("flash-attn is not installed")
    # One rank of a data-parallel layout: bf16 needs ZeRO-1.
    case = Case("DP2 ZeRO-1", policy, tied=True, precision=precision, attention=attention)
    outcome = compare(case, [run_case(case)])
    assert not outcome.misses, outcome
