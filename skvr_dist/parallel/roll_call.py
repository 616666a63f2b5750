"""Which ranks of a failed run still live, and what each has met, asked of the store of the process group.

Every rank appends a line to one key and counts itself in another. It then asks for the count alone until that is
complete or the time is up, and for the lines once. So the store has little to do however many ranks there are: if each
rank asked for the key of each other one, that of a run of 1,024 would be busy for minutes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store

_HOSTS, _SIGNS, _COUNT, _READ = "skvr/hosts", "skvr/signs", "skvr/count", "skvr/read"
# Rank 0 holds the store, so it stays until the others have read it: ranks that find no store take rank 0 for the one
# that died. Launchers give the rest 30 s after the first has ended.
_READING_SECONDS = 10.0


@dataclass(frozen=True)
class Sign:
    """What a rank leaves in the store when a run fails."""

    sentence: str = ""
    """What it met itself; empty if it only noticed that another one was gone."""
    is_for_user: bool = False
    """Whether a user can put that in order, rather than start the run again as it is."""


def announce_host(store: Store, rank: int, host: str) -> None:
    """Leave the name of a rank's host, when the run starts."""
    _append(store, _HOSTS, {"rank": rank, "host": host})


def announced_hosts(store: Store, world_size: int) -> tuple[str, ...]:
    """The host of each rank, once all have announced theirs."""
    hosts = {line["rank"]: line["host"] for line in _lines(store, _HOSTS)}
    return tuple(hosts[rank] for rank in range(world_size))


def call_the_roll(store: Store, rank: int, world_size: int, mine: Sign, seconds: float) -> dict[int, Sign]:
    """The signs of the ranks that leave one within `seconds`, this one's among them; returns as soon as all have.

    Raises:
        RuntimeError: the store is gone, with the rank that held it.
    """
    _append(store, _SIGNS, {"rank": rank, **asdict(mine)})
    store.add(_COUNT, 1)  # after the line, so that whoever sees a full count finds all lines
    _wait_for(store, _COUNT, world_size, world_size, seconds)
    signs = {line.pop("rank"): Sign(**line) for line in _lines(store, _SIGNS)}
    store.add(_READ, 1)
    if rank == 0:
        _wait_for(store, _READ, len(signs), 1, _READING_SECONDS)
    return signs


def _wait_for(store: Store, counter: str, full: int, askers: int, seconds: float) -> None:
    """Wait until a counter is full, at most `seconds`; all askers together ask a few thousand times a second."""
    deadline = time.monotonic() + seconds
    while store.add(counter, 0) < full and time.monotonic() < deadline:
        time.sleep(max(0.1, askers / 4000))


def _append(store: Store, key: str, line: dict[str, Any]) -> None:
    store.append(key, json.dumps(line) + "\n")  # type: ignore[attr-defined]  # torch's stubs lack it


def _lines(store: Store, key: str) -> list[dict[str, Any]]:
    """What was appended to a key that is there."""
    found: list[dict[str, Any]] = json.loads(f"[{','.join(store.get(key).decode().splitlines())}]")
    return found


def name_the_silent(silent: Sequence[int], hosts: Sequence[str]) -> str:
    """Some ranks in words, host by host: `rank 3 on host a, ranks 8, 9 and 10 on host b`.

    Args:
        silent: ranks, ascending.
        hosts: the host of every rank of the world.
    """
    by_host: dict[str, list[int]] = {}
    for rank in silent:
        by_host.setdefault(hosts[rank], []).append(rank)
    return "; ".join(
        f"no sign of life from {_ranks(ranks)} on host {host}{', all that it has' * (len(ranks) == hosts.count(host))}"
        for host, ranks in by_host.items()
    )


def _ranks(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"
