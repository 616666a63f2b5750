"""The command that runs the host side of GPU steps without a GPU: what it builds, refuses and says of its figures."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from skvr_dist.commands.verify.gpu_dry import figures_of, figures_of_orders, table_of_orders, tables_of
from skvr_dist.config.load import validate_config
from skvr_dist.errors import UserError
from skvr_dist.lab.gpu_dry import library, measure
from skvr_dist.lab.gpu_dry.measure import failure, measurements
from skvr_dist.lab.gpu_dry.order import RankLog, order_of

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


def test_what_a_row_refuses_is_said_in_its_own_sentence() -> None:
    refused = "Traceback (most recent call last):\n  ...\nskvr_dist.errors.UserError: no fa4; use auto\nWARNING: left\n"
    assert str(failure("a row ended with code 1", refused)) == "no fa4; use auto"
    assert str(failure("a row ended with code 1", "KeyError: 3\n")).startswith("a row ended with code 1: KeyError: 3; ")


def test_a_row_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "environment", lambda _: dict(os.environ))
    monkeypatch.setattr(measure, "_SECONDS", 0)
    with pytest.raises(UserError, match="eager has not ended in 0 seconds; run it again"):
        next(measure.measure(measurements()[:1], tmp_path))


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


def log_of(rank: int, *calls: str) -> RankLog:
    """Of one of two ranks of a communicator, whose handle is another one on each rank."""
    return RankLog.parse("\n".join([f"init 1{rank} 7-1 2 {rank}", *(call.replace("@", f"1{rank}") for call in calls)]))


SEND_FIRST = ("send @ 8 1", "recv @ 8 1"), ("send @ 8 0", "recv @ 8 0")
AT_ONCE = ["group_start 0 0 -1", *SEND_FIRST[0], "group_end 0 0 -1"], list(SEND_FIRST[1])


@pytest.mark.parametrize(
    ("calls", "stuck", "differing"),
    [
        ((("send @ 8 1",), ("recv @ 8 0",)), 0, ""),
        (SEND_FIRST, 2, ""),  # each waits in its first send for the other one to receive
        (AT_ONCE, 0, ""),
        ((("all_reduce @ 4 -1", "send @ 8 1"), ("recv @ 8 0", "all_reduce @ 4 -1")), 2, ""),
        ((("send @ 8 1", "send @ 8 1"), ("recv @ 8 0",)), 0, "2 messages 0 to 1 among ranks [0, 1], 1 received"),
        ((("all_reduce @ 4 -1",), ("all_reduce @ 5 -1",)), 0, "ranks 0 and 1 differ in their collective 0"),
    ],
)
def test_what_hangs_by_the_rule_of_first_use(
    calls: tuple[Sequence[str], Sequence[str]], stuck: int, differing: str
) -> None:
    order = order_of([log_of(rank, *mine) for rank, mine in enumerate(calls)])
    assert len(order.stuck) == stuck and order.communicators == 1
    assert any(differing in each for each in order.differing) if differing else order.differing == []


def test_a_rank_that_does_not_come_to_a_communicator_holds_the_others() -> None:
    order = order_of([RankLog.parse("init a 7-1 2 0"), RankLog()])
    assert order.stuck == ["rank 0 waits at its first init among ranks [0] for a rank that never comes"]
    split = "init a 7-1 2 {0}\nsplit b a 0 {0}\nall_reduce b 4 -1"
    assert order_of([RankLog.parse(split.format(rank)) for rank in range(2)]).stuck == []


def test_layouts_that_hang_or_differ_miss_their_figures() -> None:
    played = {"layout": "PP2", "ranks": 2, "communicators": 1, "collectives": 2, "messages": 3}
    fine = played | {"stuck": [], "differing": []}
    assert [figure.met for figure in figures_of_orders([fine])] == [True, True] and not figures_of_orders([])
    bad = [fine, played | {"stuck": ["rank 0 waits"], "differing": []}]
    assert [figure.met for figure in figures_of_orders(bad)] == [False, True]
    assert "no hang" in table_of_orders(bad) and "rank 0 waits" in table_of_orders(bad)
