"""The virtual rank: one process asks of a made-up world what a rank of the real one asks of the others."""

from __future__ import annotations

import pytest

from skvr_dist.lab.verify.cases import LAYOUTS, Case
from skvr_dist.lab.verify.ranks import run_alone, run_ranks
from skvr_dist.lab.virtual.rank import Trace, trace_rank, train_recorded
from skvr_dist.lab.virtual.record import Operation, Recorder

STEPS = 2


def record(case: Case) -> Trace:
    with Recorder(make_up=False) as recorder:
        return train_recorded(case.config(), recorder, STEPS)


@pytest.mark.parametrize("layout", ["PP4 uneven", "TP2xPP2", "PP2xDP2 ZeRO-1", "DP2 ZeRO-2", "PP2xDP2 ZeRO-3"])
def test_a_virtual_rank_asks_what_a_real_one_asks(layout: str) -> None:
    """The same operations, of the same ranks, of as many bytes, and waits in the same places."""
    case = Case(layout, tied=True)
    real = run_ranks(LAYOUTS[layout].ranks, record, case)
    assert any(isinstance(event, Operation) and event.bytes for event in real[0].steps)
    for rank, trace in enumerate(real):
        virtual = run_alone(trace_rank, case.config(), rank, len(real), STEPS)
        assert (virtual.stage, virtual.replica, virtual.tensor) == (trace.stage, trace.replica, trace.tensor)
        assert virtual.start == trace.start
        assert virtual.steps == trace.steps
