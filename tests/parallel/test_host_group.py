"""All ranks in a grid over gloo: what it says is the same on all, and how many sockets it takes."""

from __future__ import annotations

import math
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from skvr_dist.host_group import HostGroup, grid
from skvr_dist.lab.verify.ranks import run_ranks


def sockets() -> int:
    return sum(c.status == psutil.CONN_ESTABLISHED for c in psutil.Process().net_connections(kind="tcp"))


def ask_everything(largest_line: int) -> dict[str, Any]:
    rank, before = dist.get_rank(), sockets()
    group = HostGroup(largest_line=largest_line)
    found: dict[str, Any] = {"sockets": sockets() - before, "counted": group.sockets}
    plan = torch.full((2, 3), rank)
    for hop in range(group.hops):
        if work := group.start_hop(hop, plan):
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


@pytest.mark.parametrize(("largest_line", "sockets"), [(12, 11), (4, 3 + 2), (3, 2 + 1 + 1)])
def test_all_ranks_learn_the_same(largest_line: int, sockets: int) -> None:
    """In one line, in a rectangle of 4 x 3 and in a box of 3 x 2 x 2."""
    ranks = run_ranks(12, ask_everything, largest_line)
    for rank, found in enumerate(ranks):
        assert found["sockets"] == found["counted"] == sockets
        assert found["sum"] == ranks[0]["sum"], "equal to the last bit"
        assert math.isclose(found["sum"][0], 7.8) and found["sum"][1] == 12
        assert found["gathered"] == [f"rank {each}" for each in range(12)]
        assert found["gathered on the first"] == (list(range(12)) if rank == 0 else None)
        assert found["scattered"] == 2 * rank
        assert found["first's"] == {"said by": 0}
        assert found["same"] == [True, False, False]
        assert found["problems"] == [None, "rank 5 is ill"]
        assert found["plan"] == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("ranks", "shape"),
    [
        (1, (1,)),
        (2, (2,)),
        (16, (16,)),
        (24, (6, 4)),
        (64, (8, 8)),
        (512, (8, 8, 8)),
        (768, (12, 8, 8)),
        (1024, (16, 8, 8)),
        (1022, (73, 7, 2)),
        (7, (7,)),
    ],
)
def test_lines_are_short_and_axes_few(ranks: int, shape: tuple[int, ...]) -> None:
    assert grid(ranks) == shape
