"""The virtual rank: one process asks of a made-up world what a rank of the real one asks of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import run_here

from skvr_dist.lab.verify.cases import LAYOUTS, Case
from skvr_dist.lab.verify.ranks import run_alone, run_ranks
from skvr_dist.lab.virtual.match import play
from skvr_dist.lab.virtual.rank import Trace, trace_rank, train_recorded
from skvr_dist.lab.virtual.record import Event, Operation, Recorder, Wait
from skvr_dist.parallel.pipeline.channel import Channel

STEPS = 2


def record(case: Case) -> Trace:
    with Recorder(make_up=False) as recorder:
        return train_recorded(case.config(), recorder, STEPS)


def everything(trace: Trace) -> list[Event]:
    return [*trace.start, *trace.steps]


@pytest.mark.parametrize("layout", ["PP4 uneven", "TP2xPP2", "PP2xDP2 ZeRO-1", "DP2 ZeRO-2", "PP2xDP2 ZeRO-3"])
def test_a_virtual_rank_asks_what_a_real_one_asks(layout: str) -> None:
    """The same operations, of the same ranks, of as many bytes, and waits in the same places."""
    case = Case(layout, tied=True, distillation="forwards only" if layout.startswith("PP") else "")
    real = run_ranks(LAYOUTS[layout].ranks, record, case)
    assert any(isinstance(event, Operation) and event.bytes for event in real[0].steps)
    for rank, trace in enumerate(real):
        virtual = run_alone(trace_rank, case.config(), rank, len(real), STEPS)
        assert (virtual.stage, virtual.replica, virtual.tensor) == (trace.stage, trace.replica, trace.tensor)
        assert everything(virtual) == everything(trace)
    for first_use in (False, True):
        assert play({trace.rank: everything(trace) for trace in real}, first_use=first_use) == []


def trace_with_channels_that_were_never_used(case: Case, rank: int) -> Trace:
    """As if receives were posted as soon as they are known, over connections that nobody has used."""
    expect = Channel.expect

    def expect_and_post(channel: Channel, sizes: list[int], ahead: bool = True) -> None:
        expect(channel, sizes, ahead)
        channel._posted = channel._post()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "_connect", lambda self: None)
        patch.setattr(Channel, "expect", expect_and_post)
        return trace_rank(case.config(), rank, LAYOUTS[case.layout].ranks)


def trace_with_a_message_too_few(case: Case, rank: int) -> Trace:
    """The first stage keeps the last of its micro-batches to itself."""
    send, sent = Channel.send, 0

    def all_but_the_last(channel: Channel, packed: object) -> None:
        nonlocal sent
        sent += 1
        if rank != 0 or sent < case.config().num_micro_batches:
            send(channel, packed)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "send", all_but_the_last)
        return trace_rank(case.config(), rank, LAYOUTS[case.layout].ranks)


@pytest.mark.parametrize(
    ("trace", "found"),
    [
        (trace_with_channels_that_were_never_used, (None, "is held by the first use of the connection at receive of")),
        (trace_with_a_message_too_few, ("rank 1 waits for receive of", "rank 1 waits for receive of")),
    ],
)
def test_a_broken_schedule_is_caught(trace: Callable[[Case, int], Trace], found: tuple[str | None, str | None]) -> None:
    case = Case("PP2")
    records = {rank: everything(run_alone(trace, case, rank)) for rank in range(2)}
    for first_use, expected in zip((False, True), found, strict=True):
        wrong = play(records, first_use=first_use)
        assert (expected is None and not wrong) or (expected is not None and expected in wrong[-1])


def message(name: str, peer: int, size: int = 8, group: str = "g") -> Operation:
    return Operation(name, group, (0, 1), size, peer, "here")


def collective(name: str, size: int = 8, group: str = "g") -> Operation:
    return Operation(name, group, (0, 1, 2), size, None, "here")


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ([message("send", 1)], [message("receive", 0)], None),
        (
            [message("send", 1)],
            [message("receive", 0, 4)],
            "rank 1 asks for receive of 4 bytes in here, rank 0",
        ),
        ([message("send", 1)], [], "rank 0 asks for send of 8 bytes in here, rank 1 for nothing"),
        ([message("receive", 1), Wait(0)], [message("receive", 0), Wait(0)], "rank 0 waits for receive"),
        (  # each receives before it sends, but waits for neither first
            [message("receive", 1), message("send", 1), Wait(0), Wait(1)],
            [message("receive", 0), message("send", 0), Wait(0), Wait(1)],
            None,
        ),
        (
            [message("receive", 1), Wait(0), message("send", 1)],
            [message("receive", 0), Wait(0), message("send", 0)],
            "rank 1 waits for receive of 8 bytes in here with rank 0, which never comes",
        ),
        ([collective("all_reduce"), Wait(0)], [collective("all_reduce"), Wait(0)], None),  # rank 2 has no record
        ([collective("all_reduce")], [collective("broadcast")], "operation 0 of group g: rank 1 asks for broadcast of"),
        ([collective("all_reduce")], [collective("all_reduce", 16)], "rank 1 asks for all_reduce of 16 bytes"),
        (
            [collective("all_reduce"), Wait(0), collective("all_reduce", group="h"), Wait(1)],
            [collective("all_reduce", group="h"), Wait(0), collective("all_reduce"), Wait(1)],
            "rank 0 waits for all_reduce of 8 bytes in here with ranks 0, 1, 2, which never comes",
        ),
    ],
)
def test_records_are_matched(first: list[Event], second: list[Event], found: str | None) -> None:
    wrong = play({0: first, 1: second}, first_use=False)
    assert wrong == [] if found is None else any(found in sentence for sentence in wrong), wrong


def test_the_command(tmp_path: Path) -> None:
    command = ["tools/dryrun.py", "--config", "quickstart", "train.global_batch_size=64"]
    command += ["data.lanes=64", "parallel.pipeline=4", "parallel.stage_layers=null", "parallel.tensor=2"]
    printed = run_here(*command, "--gpus", "64", "--json", str(tmp_path / "dryrun.json"))
    assert "64 ranks (4 stages x 8 replicas x 2 tensor-parallel), 11 of them traced over 2 steps" in printed
    record = json.loads((tmp_path / "dryrun.json").read_text())
    assert record["wrong"] == [] and len(record["ranks"]) == 11
    # The plan, and everything that is summed; a grid of 8 x 8, twice, the other tensor-parallel rank and the store.
    assert {row["world collectives a step"] for row in record["ranks"]} == {2}
    assert {row["sockets"] for row in record["ranks"]} == {2 * (7 + 7) + 1 + 1}
    replicas = run_here(*command[:3], "parallel.pipeline=1", "--gpus", "2", "--steps", "1")
    assert "2 collectives of all ranks a step; bound 2: met" in replicas  # gradients are those of replicas
    refused = run_here(*command, "--gpus", "60", code=2)
    assert "error: --gpus 60 cannot be laid out as parallel.pipeline 4 x parallel.tensor 2" in refused
    assert refused.strip().endswith("the nearest that can: 32 and 64")
