"""The kernels compile for GPUs that are not there, within their limits."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from skvr_kernels.arena import DTYPES, LARGEST_HEAD
from skvr_kernels.compiling import Compiled
from skvr_kernels.tiles import Kernel, Tiles, tiles_for

from skvr_dist.commands.verify import kernels
from skvr_dist.errors import UserError

# Of all that `tools/verify.py kernels` compiles, the ones that are nearest to their limits.
TIGHT = """
import dataclasses, json, torch
from skvr_kernels.compiling import compiled
found = [compiled(*each) for each in (
    ("forward", 90, torch.bfloat16, 128),
    ("keys", 90, torch.bfloat16, 96),
    ("keys", 120, torch.bfloat16, 256),
)]
print(json.dumps([[each.misses, each.registers, each.wgmma] for each in found]))
"""


def test_the_tightest_kernels_keep_their_limits(tmp_path: Path) -> None:
    """In a process that does not interpret, and has compiled nothing before."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", TIGHT], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for misses, registers, _ in found:
        assert misses == [] and 128 < registers <= 255
    assert [wgmma > 0 for *_, wgmma in found] == [True, True, False]


def test_tiles_of_every_head_size_are_powers_of_two() -> None:
    """Which Triton asks for, and the interpreter, with tiles of its own, does not see."""
    for kernel, capability in itertools.product(get_args(Kernel), (80, 86, 90, 100, 120)):
        for head_size, dtype in itertools.product(range(2, LARGEST_HEAD + 1, 2), DTYPES):
            tiles = tiles_for(kernel, capability, head_size, dtype)
            for size in (tiles.queries, tiles.keys):
                assert size == 0 or (size >= 16 and size.bit_count() == 1), (kernel, capability, head_size, size)


def test_limits_that_are_not_kept_are_named() -> None:
    right = {"kernel": "keys", "capability": 90, "dtype": "bf16", "head_size": 128, "tiles": Tiles(64, 64, 8, 2)}
    assert Compiled(**right, registers=250, stack_bytes=0, shared_bytes=98816, wgmma=40).misses == []
    wrong = Compiled(**right, registers=255, stack_bytes=32, shared_bytes=232449, wgmma=0)
    assert wrong.misses == ["spills 32 bytes", "takes 232449 bytes of shared memory", "has no wgmma"]
    small = {**right, "tiles": Tiles(64, 32, 8, 1), "head_size": 256}
    assert Compiled(**small, registers=174, stack_bytes=0, shared_bytes=131072, wgmma=0).misses == []


def test_what_is_missing_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="TRITON_INTERPRET is 1, so that Triton compiles nothing; unset it"):
        kernels.run(argparse.Namespace(json=None))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="the package triton is not installed; pip install triton"):
        kernels.run(argparse.Namespace(json=None))
