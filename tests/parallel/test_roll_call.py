"""The roll call of a run of 1,024 ranks: who is silent, from the store alone."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist
from torch.distributed import distributed_c10d

from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.roll_call import Sign, announce_host, announced_hosts, call_the_roll, name_the_silent

WORLD, PROCESSES, PER_HOST, SECONDS = 1024, 8, 8, 2.0
SILENT = [5, 500, 1023]

Found = tuple[list[int], str, float]


def play_a_share() -> tuple[list[Found], tuple[str, ...]]:
    """Play every 8th rank, each in a thread: silent ranks, what rank 7 said, seconds; and the hosts that are known."""
    store, process = distributed_c10d._get_default_store(), dist.get_rank()
    mine = range(process, WORLD, PROCESSES)
    for rank in mine:
        announce_host(store, rank, f"h{rank // PER_HOST}")
    dist.barrier()

    def call(rank: int) -> Found:
        started = time.monotonic()
        sign = Sign("the disk is full") if rank == 7 else Sign()
        signs = call_the_roll(store, rank, WORLD, sign, SECONDS)
        return sorted(set(range(WORLD)) - signs.keys()), signs[7].sentence, time.monotonic() - started

    with ThreadPoolExecutor(len(mine)) as threads:
        found = list(threads.map(call, (rank for rank in mine if rank not in SILENT)))
    dist.barrier()  # the process with the store stays for the others
    return found, announced_hosts(store, WORLD)


def test_three_silent_ranks_of_1024_are_named_in_seconds() -> None:
    shares = run_ranks(PROCESSES, play_a_share)
    found = [each for share, _ in shares for each in share]
    assert len(found) == WORLD - len(SILENT)
    for silent, said, seconds in found:
        assert (silent, said) == (SILENT, "the disk is full")
        assert seconds < 4 * SECONDS
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
