"""The command that runs the host side of GPU steps without a GPU: what it builds, refuses and says of its figures."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from skvr_dist.commands.verify.gpu_dry import figures_of, tables_of
from skvr_dist.config.load import validate_config
from skvr_dist.errors import UserError
from skvr_dist.lab.gpu_dry import library
from skvr_dist.lab.gpu_dry.measure import measurements

WAIT = {"where": "skvr_dist/model/loss.py:1", "package": "skvr_dist", "called_from": "", "in_update": False, "times": 2}


def row(part: str, **changed: Any) -> dict[str, Any]:
    counts = ("launches", "triton_launches", "products", "copies_to_device", "copies_to_host", "waits")
    return {
        "row": f"a model, {part}",
        "part": part,
        **dict.fromkeys(counts, 900),
        "waiting": [WAIT | {"in_update": True, "times": 1}, WAIT | {"package": "deepspeed"}],
        "peak_gib": 1.0,
        "step_seconds": 1.0,
        **({"loss_extra_mib": 700.0} if part == "loss" else {}),
        **changed,
    }


def test_figures_at_their_bounds_are_met_and_beyond_them_missed() -> None:
    parts = ("engine", "decoder", "loss")
    met = figures_of([row(part) for part in parts])
    assert [figure.met for figure in met] == [True] * 4
    beyond: dict[str, dict[str, Any]] = {
        "engine": {"waiting": [WAIT, WAIT | {"in_update": True}]},
        "decoder": {"launches": 901},
        "loss": {"loss_extra_mib": 700.5},
    }
    missed = figures_of([row(part, **beyond[part]) for part in parts])
    assert [figure.met for figure in missed] == [False] * 4
    assert "skvr_dist/model/loss.py:1 | micro-batch | skvr_dist" in tables_of([row("engine", waiting=[WAIT])])


def test_every_row_can_be_configured() -> None:
    rows = measurements()
    assert len({each.name for each in rows}) == len(rows)
    for each in rows:
        assert validate_config(each.asked("auto")["config"]).num_micro_batches == each.micro_batches


def test_a_pytorch_without_cuda_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"is built without CUDA; run this in .*`make cuda-env` makes"):
        library.build(Path("nowhere"))


def test_the_driver_that_runs_nothing_can_be_built_and_called(tmp_path: Path) -> None:
    source = tmp_path / "driver.c"
    stubs = library._stubs({"cuInit"}, "count")
    source.write_text((Path(library.__file__).parent / "driver.c").read_text() + stubs)
    library._compile([source], tmp_path / library.DRIVER)
    driver, devices = ctypes.CDLL(str(tmp_path / library.DRIVER)), ctypes.c_int()
    assert driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(devices)) == 0
    assert devices.value == 8
    assert {"cudaMalloc", "cudaLaunchKernel", "ncclSend"} <= library._defined("runtime.c")
