"""All ranks in rows and columns over gloo: what it says is the same on all, and how many sockets it takes."""

from __future__ import annotations

import math
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from skvr_dist.host_group import HostGroup, row_width
from skvr_dist.lab.verify.ranks import run_ranks


def sockets() -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections(kind="tcp"))


def ask_everything() -> dict[str, Any]:
    rank, before = dist.get_rank(), sockets()
    group = HostGroup()
    found: dict[str, Any] = {"sockets": sockets() - before, "counted": group.sockets}
    plan = torch.full((2, 3), rank)
    for start in (group.start_to_heads, group.start_to_rows):
        if work := start(plan):
            work.wait()
    twice = group.gather_to_first(rank)
    return found | {
        "sum": group.sum([0.1 * (rank + 1), 1.0, 1e16 if rank == 3 else -1.0]),
        "gathered": group.gather(f"rank {rank}"),
        "gathered on the first": twice,
        "scattered": group.scatter_from_first([2 * each for each in twice] if twice else None),
        "first's": group.from_first({"said by": rank}),
        "same": [group.is_same(b"a"), group.is_same(b"b" if rank == 7 else b"a"), group.is_same(bytes([rank // 4]))],
        "problems": [group.first_problem(None), group.first_problem(f"rank {rank} is ill" if rank > 4 else None)],
        "plan": plan.tolist(),
    }


def test_all_ranks_learn_the_same() -> None:
    ranks = run_ranks(12, ask_everything)
    for rank, found in enumerate(ranks):
        assert found["sockets"] == found["counted"] == 3 + 2, "3 others in the row, 2 in the column"
        assert found["sum"] == ranks[0]["sum"], "equal to the last bit"
        assert math.isclose(found["sum"][0], 7.8) and found["sum"][1] == 12
        assert found["gathered"] == [f"rank {each}" for each in range(12)]
        assert found["gathered on the first"] == (list(range(12)) if rank == 0 else None)
        assert found["scattered"] == 2 * rank
        assert found["first's"] == {"said by": 0}
        assert found["same"] == [True, False, False]
        assert found["problems"] == [None, "rank 5 is ill"]
        assert found["plan"] == [[0] * 3] * 2


@pytest.mark.parametrize(("ranks", "width"), [(1, 1), (2, 2), (6, 3), (12, 4), (24, 6), (64, 8), (1024, 32), (7, 7)])
def test_rows_are_as_wide_as_connects_the_fewest(ranks: int, width: int) -> None:
    assert row_width(ranks) == width
