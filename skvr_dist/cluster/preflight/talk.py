"""What the probes of all hosts do together: a sum over all, then messages between every two of them, timed."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from skvr_dist.cluster.network import use_interface

_ROUND_TRIPS = 20
_ELEMENTS = 1 << 20  # fp32: 4 MiB


def talk_to_all(rank: int, size: int, address: str, port: int, interface: str, patience: float) -> dict[str, Any]:
    """Join the others at an address and port, check what arrives, and time it; collective.

    Args:
        rank: of this host among `size`.
        interface: to use, where the user has named none.
        patience: seconds to wait for another host at most.

    Returns:
        `wrong`: what arrived and is not what was sent, in words; `pairs`: of the pairs in which this host is the
        first, the other one, seconds of half a round trip and bytes per second one way.
    """
    use_interface(interface)
    on_gpu = os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{'[' + address + ']' if ':' in address else address}:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience),
    )
    try:
        total = torch.arange(_ELEMENTS, dtype=torch.float32, device=device).remainder_(1024) * (rank + 1)
        dist.all_reduce(total)
        expected = torch.arange(_ELEMENTS, dtype=torch.float32).remainder_(1024) * (size * (size + 1) // 2)
        wrong = [] if torch.equal(total.cpu(), expected) else ["the sum over all hosts"]
        pairs = []
        for turn in _tournament(size):
            for first, second in turn:
                if rank in (first, second):
                    seconds_each, rate, whole = _ping_pong(rank, first, second, device)
                    wrong += [] if whole else [f"what host {second if rank == first else first} sent"]
                    if rank == first:
                        pairs.append([second, seconds_each, rate])
            dist.barrier()
        return {"wrong": wrong, "pairs": pairs}
    finally:
        dist.destroy_process_group()


def _tournament(size: int) -> list[list[tuple[int, int]]]:
    """Turns in which every host meets every other once, each at most one at a time."""
    places: list[int] = list(range(size + size % 2))
    turns = []
    for _ in range(len(places) - 1):
        halves = zip(places[: len(places) // 2], reversed(places[len(places) // 2 :]), strict=True)
        turns.append([(min(pair), max(pair)) for pair in halves if max(pair) < size])
        places.insert(1, places.pop())
    return turns


def _ping_pong(rank: int, first: int, second: int, device: torch.device) -> tuple[float, float, bool]:
    """Seconds of half a round trip of 4 bytes, bytes per second one way, and whether all arrived whole."""
    other = second if rank == first else first
    small = torch.zeros(1, device=device)
    mine = torch.arange(_ELEMENTS, dtype=torch.float32, device=device) + rank
    theirs = torch.empty_like(mine)
    _there_and_back(rank == first, other, small, small)
    started = time.perf_counter()
    for _ in range(_ROUND_TRIPS):
        _there_and_back(rank == first, other, small, small)
    latency = (time.perf_counter() - started) / _ROUND_TRIPS / 2
    started = time.perf_counter()
    _there_and_back(rank == first, other, mine, theirs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = 2 * mine.nbytes / (time.perf_counter() - started)
    return latency, rate, torch.equal(theirs, mine - rank + other)


def _there_and_back(begins: bool, other: int, sent: torch.Tensor, received: torch.Tensor) -> None:
    if begins:
        dist.send(sent, other)
        dist.recv(received, other)
    else:
        dist.recv(received, other)
        dist.send(sent, other)
