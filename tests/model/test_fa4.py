"""FlashAttention 4 as PyTorch calls it, compiled for an H100 where no GPU is.

Where the package is: in the environment of the newest versions (`make test-newest`); it is a pre-release that moves.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _fa4

from skvr_dist.lab.verify.ranks import run_alone
from skvr_dist.model.attention_choice import activate

pytestmark = pytest.mark.newest

# It compiles for these instead of asking a driver; under fake tensors it runs nothing.
H100 = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}


def compile_both_passes() -> list[tuple[int, ...]]:
    """Of two documents in 512 tokens, two query heads on each key/value head; returns shapes of the results."""
    os.environ.update(H100)
    activate("fa4")
    with FakeTensorMode():
        q, k, v = (torch.empty(512, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        bounds = torch.empty(3, dtype=torch.int32, device="cuda")
        out, sums = _fa4._fa4_run_forward(q, k, v, bounds, bounds, 256, 256, None, True, None, None, None)
        gradients = _fa4._fa4_run_backward(out, q, k, v, out, sums, bounds, bounds, None, True, None, None)
    return [tuple(x.shape) for x in (out, sums, *gradients)]


def test_torch_and_the_installed_release_fit() -> None:
    passes = run_alone(compile_both_passes)
    assert passes == [(512, 4, 64), (4, 512), (512, 4, 64), (512, 2, 64), (512, 2, 64)]
