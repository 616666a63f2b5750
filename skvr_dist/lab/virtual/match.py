"""Plays the records of several ranks against each other: do partners agree, and does every rank come to its end?

A rank goes through its record and stops at a wait until the operation is done: a collective when every member has asked
for it, a receive when the sender has asked, a send when the receiver has (no buffering is counted on). Members that
have no record are taken to come along.

With `first_use`, a rank also stops at the first operation of a group, or of a direction between two ranks, until the
others have come to theirs, as NCCL connects (`skvr_dist.lab.verify.first_use`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skvr_dist.lab.virtual.record import Event, Operation, Wait

# Of one exchange: the group, for two ranks the direction, and the how-manieth of it.
Place = tuple[str, str, int]


@dataclass
class _Player:
    rank: int
    events: Sequence[Event]
    position: int = 0
    places: list[tuple[Operation, Place]] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    @property
    def done(self) -> bool:
        return self.position == len(self.events)


def play(records: Mapping[int, Sequence[Event]], *, first_use: bool) -> list[str]:
    """What is wrong with the records, in sentences; nothing if every rank comes to its end.

    Args:
        records: of each rank, from its start on, by the rank's number in the world.
        first_use: a group's first operation holds its ranks until they have met.
    """
    players = {rank: _Player(rank, events) for rank, events in records.items()}
    asked: dict[Place, dict[int, Operation]] = defaultdict(dict)
    wrong: list[str] = []

    def partners(operation: Operation) -> list[int]:
        ranks = operation.ranks if operation.peer is None else (operation.peer,)
        return [rank for rank in ranks if rank in players]

    def met(operation: Operation, place: Place) -> bool:
        return all(rank in asked[place] for rank in partners(operation))

    def step(player: _Player) -> bool:
        """Take the rank past its next event, if it can go on."""
        event = player.events[player.position]
        if isinstance(event, Wait):
            if not met(*player.places[event.operation]):
                return False
        elif not player.places or player.places[-1][0] is not event:  # it was not asked already, and held
            place = _place(player, event)
            player.places.append((event, place))
            asked[place][player.rank] = event
            wrong.extend(_differences(player.rank, event, place, asked[place]))
        if first_use and isinstance(event, Operation) and player.places[-1][1][2] == 0 and not met(*player.places[-1]):
            return False
        player.position += 1
        return True

    moved = True
    while moved and not wrong:
        moved = False
        for player in players.values():
            while not player.done and step(player):
                moved = True
    if not wrong:
        wrong = [_stuck(player, first_use) for player in players.values() if not player.done]
    return wrong or _left_over(asked, players)


def _place(player: _Player, operation: Operation) -> Place:
    how = "collectives"
    if operation.peer is not None:
        ends = (player.rank, operation.peer) if operation.name == "send" else (operation.peer, player.rank)
        how = f"{ends[0]} to {ends[1]}"
    number = player.counts[operation.group, how]
    player.counts[operation.group, how] += 1
    return operation.group, how, number


def _differences(rank: int, operation: Operation, place: Place, others: dict[int, Operation]) -> list[str]:
    for other, theirs in others.items():
        if other == rank:
            continue
        pair = {operation.name, theirs.name}
        if operation.peer is None and (pair != {operation.name} or theirs.bytes != operation.bytes):
            return [
                f"operation {place[2]} of group {place[0]}: rank {rank} asks for {_said(operation)}, rank {other} for "
                f"{_said(theirs)}"
            ]
        if operation.peer is not None and (pair != {"send", "receive"} or theirs.bytes != operation.bytes):
            return [
                f"message {place[2]} from rank {place[1].replace(' to ', ' to rank ')}: rank {rank} asks for "
                f"{_said(operation)}, rank {other} for {_said(theirs)}"
            ]
    return []


def _stuck(player: _Player, first_use: bool) -> str:
    event = player.events[player.position]
    operation = player.places[event.operation][0] if isinstance(event, Wait) else event
    why = "waits for" if isinstance(event, Wait) else "is held by the first use of the connection at"
    whom = f"rank {operation.peer}" if operation.peer is not None else f"ranks {_some(operation.ranks)}"
    rule = ", by NCCL's rule of first use" if first_use else ""
    return f"rank {player.rank} {why} {_said(operation)} with {whom}, which never comes{rule}"


def _left_over(asked: dict[Place, dict[int, Operation]], players: dict[int, _Player]) -> list[str]:
    """Messages whose other end never asked, though nobody waited for them."""
    found = []
    for place, by_rank in asked.items():
        for rank, operation in by_rank.items():
            if operation.peer in players and operation.peer not in by_rank:
                found.append(
                    f"message {place[2]} from rank {place[1].replace(' to ', ' to rank ')}: rank {rank} asks for "
                    f"{_said(operation)}, rank {operation.peer} for nothing"
                )
    return found


def _said(operation: Operation) -> str:
    return f"{operation.name} of {operation.bytes} bytes in {operation.where}"


def _some(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]} to {ranks[-1]} ({len(ranks)} of them)"
