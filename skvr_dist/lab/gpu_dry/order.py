"""The order in which the ranks of a layout talk over NCCL, and whether NCCL's rule of first use lets them go on.

Every rank is a process that trains with the real engine over the runtime that runs nothing, which writes down what is
asked of NCCL. NCCL connects ranks when they first talk, and holds the host for that time. A communicator that is made
holds each of its ranks until all have come, its first collective does so again, and the first message of two ranks in a
direction holds both of them. What is issued in one group comes at once. Played by these rules, logs that cannot be
played to their ends are of a program that hangs on GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

_MESSAGES = ("send", "recv")


@dataclass(frozen=True)
class Call:
    """What a rank asks of NCCL."""

    name: str
    """`init` where the communicator is made."""
    communicator: str
    """Its id, the same on all its ranks."""
    elements: int = 0
    peer: int | None = None
    """The rank of the communicator that a message is for, or from."""


@dataclass
class RankLog:
    """The calls of one rank, those of a group together."""

    steps: list[list[Call]] = field(default_factory=list)
    ranks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """This rank's number within each communicator, and how many ranks it has (0: what was split does not say)."""

    @classmethod
    def parse(cls, text: str) -> RankLog:
        """Read what the runtime has written of one rank.

        Raises:
            ValueError: a call belongs to a communicator that nobody has made.
        """
        log, ids, splits, depth = cls(), dict[str, str](), defaultdict[str, int](int), 0
        for line in text.splitlines():
            name, handle, *rest = line.split()
            if name in ("group_start", "group_end"):
                if name == "group_start" and depth == 0:
                    log.steps.append([])
                depth += 1 if name == "group_start" else -1
                continue
            if name == "init":
                ids[handle] = rest[0]
                log.ranks[rest[0]] = int(rest[2]), int(rest[1])
                call = Call("init", rest[0])
            elif name == "split":
                parent, color, key = rest
                splits[parent] += 1
                ids[handle] = f"{ids[parent]}/{splits[parent]}/{color}"
                if int(color) < 0:  # this rank is in none of the parts
                    continue
                log.ranks[ids[handle]] = int(key), 0
                call = Call("init", ids[handle])
            else:
                if handle not in ids:
                    raise ValueError(f"{line!r} is of a communicator that was not made")
                elements, peer = int(rest[0]), int(rest[1])
                call = Call(name, ids[handle], elements, peer if name in _MESSAGES else None)
            if depth == 0:
                log.steps.append([])
            log.steps[-1].append(call)
        log.steps = [step for step in log.steps if step]
        return log


@dataclass(frozen=True)
class Order:
    """What the logs of all ranks say."""

    communicators: int
    collectives: int
    messages: int
    """Sent."""
    stuck: list[str]
    """Where ranks wait for each other for ever, a sentence for each of them."""
    differing: list[str]
    """Where ranks of a communicator do not agree on what they do."""


def order_of(logs: Sequence[RankLog]) -> Order:
    """Play the logs of ranks 0, 1, ... of a run."""
    members: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, log in enumerate(logs):
        for communicator, (number, _) in log.ranks.items():
            members[communicator][number] = rank
    calls = [call for log in logs for step in log.steps for call in step]
    messages = sum(call.name == "send" for call in calls)
    collectives = sum(call.name not in (*_MESSAGES, "init") for call in calls)
    return Order(len(members), collectives, messages, _stuck(logs, members), _differing(logs, members))


_Place = tuple[str, str]
"""A communicator, and what is connected there: `init`, `collectives` or the direction between two of its ranks."""


def _place(call: Call, own: int) -> _Place:
    if call.peer is None:
        return call.communicator, "init" if call.name == "init" else "collectives"
    pair = (own, call.peer) if call.name == "send" else (call.peer, own)
    return call.communicator, f"{pair[0]} to {pair[1]}"


def _needed(call: Call, place: _Place, log: RankLog, members: dict[int, int]) -> set[int]:
    """The ranks that must come to a place; -1 stands for one that never does."""
    if call.peer is None:
        _, count = log.ranks[call.communicator]
        return {members.get(number, -1) for number in range(count)} if count else set(members.values())
    return {members.get(number, -1) for number in (log.ranks[place[0]][0], call.peer)}


def _stuck(logs: Sequence[RankLog], members: dict[str, dict[int, int]]) -> list[str]:
    came: dict[_Place, set[int]] = defaultdict(set)
    at, moved = [0] * len(logs), True

    def missing(rank: int) -> Iterator[tuple[Call, set[int]]]:
        for call in logs[rank].steps[at[rank]]:
            place = _place(call, logs[rank].ranks[call.communicator][0])
            late = _needed(call, place, logs[rank], members[call.communicator]) - came[place]
            if late:
                yield call, late

    def arrive(rank: int) -> None:
        for call in logs[rank].steps[at[rank]]:
            came[_place(call, logs[rank].ranks[call.communicator][0])].add(rank)

    while moved:
        moved = False
        for rank, log in enumerate(logs):
            while at[rank] < len(log.steps):
                arrive(rank)
                if any(missing(rank)):
                    break
                at[rank], moved = at[rank] + 1, True
    return [
        f"rank {rank} waits at its first {call.name} among ranks {sorted(members[call.communicator].values())} for "
        f"{', '.join(f'rank {other}' if other >= 0 else 'a rank that never comes' for other in sorted(late))}"
        for rank, log in enumerate(logs)
        if at[rank] < len(log.steps)
        for call, late in missing(rank)
    ]


def _differing(logs: Sequence[RankLog], members: dict[str, dict[int, int]]) -> list[str]:
    """Collectives whose kinds or sizes are not the same on all ranks, and messages that are sent otherwise than
    received."""
    collectives: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    sent: dict[_Place, list[int]] = defaultdict(list)
    received: dict[_Place, list[int]] = defaultdict(list)
    for rank, log in enumerate(logs):
        for call in (call for step in log.steps for call in step if call.name != "init"):
            if call.peer is None:
                collectives[call.communicator, rank].append((call.name, call.elements))
                continue
            place = _place(call, log.ranks[call.communicator][0])
            (sent if call.name == "send" else received)[place].append(call.elements)
    found = []
    for communicator, by_number in members.items():
        ranks = sorted(by_number.values())
        first = ranks[0]
        for other in ranks[1:]:
            mine, theirs = collectives[communicator, first], collectives[communicator, other]
            if mine != theirs:
                number = next((n for n, pair in enumerate(zip(mine, theirs, strict=False)) if len({*pair}) > 1), None)
                where = f"their collective {number}" if number is not None else "how many collectives they have"
                found.append(f"ranks {first} and {other} differ in {where} among ranks {ranks}")
    for place in {*sent, *received}:
        if sent[place] != received[place]:
            ranks = sorted(members[place[0]].values())
            found.append(f"{len(sent[place])} messages {place[1]} among ranks {ranks}, {len(received[place])} received")
    return found
