"""The roll call of a run of 1,024 ranks: who is silent, from the store alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d

from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.roll_call import Sign, announce_host, announced_hosts, call_the_roll, name_the_silent

WORLD, PROCESSES, PER_HOST = 1024, 8, 8
SECONDS = 6.0
POLLS = int(SECONDS / 0.256) + 2  # a rank of 1,024 asks every 0.256 s, so at most that often
SILENT = [5, 500, 1023]

Found = tuple[list[int], str, int, int]


class Counted:
    """A store that counts what it is asked, and apart from that how often a counter is read."""

    def __init__(self, store: dist.Store) -> None:
        self._store, self.calls, self.polls = store, 0, 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(key: str, *values: Any) -> Any:
            is_poll = (name, values) == ("add", (0,))
            self.polls, self.calls = self.polls + is_poll, self.calls + (not is_poll)
            return getattr(self._store, name)(key, *values)

        return call


def play_a_share() -> tuple[list[Found], tuple[str, ...]]:
    """Play every 8th rank, each in a thread: who is silent, what rank 7 said, calls and polls; and the known hosts."""
    store, process = distributed_c10d._get_default_store(), dist.get_rank()
    mine = range(process, WORLD, PROCESSES)
    for rank in mine:
        announce_host(store, rank, f"h{rank // PER_HOST}")
    dist.barrier()

    def call(rank: int) -> Found:
        counted = Counted(store)
        sign = Sign("the disk is full") if rank == 7 else Sign()
        signs = call_the_roll(cast(dist.Store, counted), rank, WORLD, sign, SECONDS)
        return sorted(set(range(WORLD)) - signs.keys()), signs[7].sentence, counted.calls, counted.polls if rank else 0

    with ThreadPoolExecutor(len(mine)) as threads:
        found = list(threads.map(call, (rank for rank in mine if rank not in SILENT)))
    dist.barrier()  # the process with the store stays for the others
    return found, announced_hosts(store, WORLD)


def test_three_silent_ranks_of_1024_are_named_by_a_handful_of_calls() -> None:
    shares = run_ranks(PROCESSES, play_a_share)
    found = [each for share, _ in shares for each in share]
    assert len(found) == WORLD - len(SILENT)
    for silent, said, calls, polls in found:
        assert (silent, said) == (SILENT, "the disk is full")
        assert calls == 4 and polls <= POLLS
    assert name_the_silent(SILENT, shares[0][1]) == (
        "no sign of life from rank 5 on host h0; no sign of life from rank 500 on host h62; no sign of life from rank "
        "1023 on host h127"
    )


def test_silent_ranks_are_named_host_by_host() -> None:
    hosts = ["a", "a", "b", "b", "b"]
    assert name_the_silent([0, 3, 4], hosts) == (
        "no sign of life from rank 0 on host a; no sign of life from ranks 3 and 4 on host b"
    )
    assert name_the_silent([0, 1], hosts) == "no sign of life from ranks 0 and 1 on host a, all that it has"
