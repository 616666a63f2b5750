"""Plans for a smaller cache: the layers that each profile keeps, searched on one text and tested on another.

Shapes: N sequences, S sequence length, L layers.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import UserError
from skvr_dist.evaluate.intervals import Bootstrap, Interval
from skvr_dist.evaluate.prefix_tree import PrefixTree
from skvr_dist.evaluate.search import Retained, Room, Search, one_shot
from skvr_dist.model.decoder import Decoder
from skvr_dist.routing import CacheStrategy

PLAN_FILE = "cache-plan.json"
"""File in a checkpoint's folder that holds the plan which was made for it last."""
MOST_SETS_TO_EXHAUST = 512
"""Where there are no more sets than that, all of them are tried: they share so many layers that it costs no more."""


@dataclass(frozen=True)
class Profile:
    """What a plan is asked for: how many layers may keep a cache, and up to which one."""

    name: str
    size: int
    last: int | None = None
    """The highest layer that may keep one; None allows all."""


@dataclass(frozen=True)
class Tested:
    """A set of layers on a test text."""

    loss: float
    """Nats per token."""
    rise: Interval
    """Over the loss at full retention, nats per token."""


@dataclass(frozen=True)
class Rival:
    """Another way to choose as many layers."""

    retained: list[Retained]
    """One set, or those drawn at random."""
    loss: dict[str, float]
    """On each test text; of random sets the median."""
    gain: dict[str, Interval]
    """What the searched set saves against it, nats per token; above 0 the search is better. Of random sets, against
    the one in the middle."""


@dataclass(frozen=True)
class PlannedProfile:
    """The layers that a profile keeps, and what that costs."""

    profile: Profile
    calibration: str
    """The text that it was searched on."""
    retained: Retained
    calibration_loss: float
    tested: dict[str, Tested]
    """By the name of the test text."""
    rivals: dict[str, Rival]


@dataclass(frozen=True)
class SearchCost:
    """What a search has taken."""

    evaluated_layers: int
    """Layers that were run over the calibration text."""
    measured_sets: int
    layers_without_sharing: int
    """What the measured sets would have taken one by one."""


@dataclass(frozen=True)
class FrontPoint:
    """A set of layers that none of its size or below beats on the calibration text, of those that were tried."""

    retained: Retained
    calibration_loss: float
    """Nats per token."""


@dataclass(frozen=True)
class CachePlan:
    """All profiles, searched on every calibration text."""

    full_loss: dict[str, float]
    """At full retention, by the name of the test text."""
    profiles: list[PlannedProfile]
    front: dict[str, dict[int, FrontPoint]]
    """Pareto front of size and loss, by calibration text and size; where a size is missing a smaller set is better."""
    cost: dict[str, SearchCost]


def plan_caches(
    decoder: Decoder,
    calibrations: Mapping[str, Sequence[MicroBatch]],
    tests: Mapping[str, Sequence[MicroBatch]],
    profiles: Sequence[Profile],
    *,
    required: Retained = (0,),
    swap_rounds: int = 3,
    most_to_exhaust: int = MOST_SETS_TO_EXHAUST,
    random_sets: int = 8,
    seed: int = 0,
) -> CachePlan:
    """Search the layers of each profile on each calibration text, and measure them on each test text.

    Args:
        required: layers that keep a cache in any case.
        swap_rounds: exchanges after the elimination, at most.
        most_to_exhaust: where there are no more sets than that, all are tried instead.
        random_sets: drawn beside each profile.

    Raises:
        UserError: a profile is smaller than `required`, or has more layers than may keep a cache.
    """
    layers = decoder.config.num_hidden_layers
    rooms = {profile: _room(profile, layers, required) for profile in profiles}
    searches = {name: Search(decoder, batches) for name, batches in calibrations.items()}
    chosen = {
        (name, profile): _search(search, room, profile.size, swap_rounds, most_to_exhaust)
        for name, search in searches.items()
        for profile, room in rooms.items()
    }
    costs = {name: _cost(search, layers) for name, search in searches.items()}
    rivals = {
        (name, profile): _rivals(searches[name], rooms[profile], profile.size, random_sets, seed)
        for name, profile in chosen
    }
    full = tuple(range(layers))
    wanted = {full, *chosen.values(), *(s for each in rivals.values() for sets in each.values() for s in sets)}
    texts = {name: _Text(decoder, batches, sorted(wanted)) for name, batches in tests.items()}
    return CachePlan(
        full_loss={name: text.loss(full) for name, text in texts.items()},
        profiles=[
            PlannedProfile(
                profile=profile,
                calibration=name,
                retained=retained,
                calibration_loss=searches[name].measured[retained],
                tested={n: Tested(text.loss(retained), text.difference(retained, full)) for n, text in texts.items()},
                rivals={kind: _rival(sets, retained, texts) for kind, sets in rivals[(name, profile)].items() if sets},
            )
            for (name, profile), retained in chosen.items()
        ],
        front={name: _front(search.measured) for name, search in searches.items()},
        cost=costs,
    )


class _Text:
    """A test text, with the token losses of all sets that are asked about."""

    def __init__(self, decoder: Decoder, batches: Sequence[MicroBatch], sets: Sequence[Retained]) -> None:
        strategies = [CacheStrategy(decoder.config.num_hidden_layers, retained) for retained in sets]
        losses = PrefixTree(decoder, batches).token_losses(strategies)
        self._losses: dict[Retained, Tensor] = dict(zip(sets, losses, strict=True))
        self._bootstrap = Bootstrap(batches)

    def loss(self, retained: Retained) -> float:
        return self._bootstrap.mean(self._losses[retained]).mean

    def difference(self, retained: Retained, other: Retained) -> Interval:
        return self._bootstrap.mean(self._losses[retained] - self._losses[other])


def _room(profile: Profile, layers: int, required: Retained) -> Room:
    room = Room(layers, required, profile.last)
    if not len(room.required) <= profile.size <= len(room.largest):
        raise UserError(
            f"profile {profile.name} keeps {profile.size} layers, but {len(room.required)} must and "
            f"{len(room.largest)} may keep a cache; give it another size"
        )
    return room


def _search(search: Search, room: Room, size: int, swap_rounds: int, most_to_exhaust: int) -> Retained:
    if room.count <= most_to_exhaust:
        search.measure([retained for of_size in range(len(room.required), size + 1) for retained in room.sets(of_size)])
        return search.exhaust(room, size)
    return search.swap(room, search.eliminate(room, size)[size], swap_rounds)


def _rivals(search: Search, room: Room, size: int, random_sets: int, seed: int) -> dict[str, list[Retained]]:
    """Other sets of the same size. Evenly spaced ones only where a profile may use all layers."""
    draw = random.Random(f"{seed}:{room.required}:{room.last}:{size}")
    extra = size - len(room.required)
    drawn = [tuple(sorted((*room.required, *draw.sample(room.optional, extra)))) for _ in range(random_sets)]
    spaced = CacheStrategy.even(size, room.num_layers).retained
    return {
        "evenly spaced": [spaced] if set(room.required) <= set(spaced) <= set(room.largest) else [],
        "one-shot scores": [one_shot(search, room, size)],
        "random": drawn,
    }


def _rival(sets: list[Retained], searched: Retained, texts: Mapping[str, _Text]) -> Rival:
    middle = {name: sorted(sets, key=text.loss)[len(sets) // 2] for name, text in texts.items()}
    return Rival(
        retained=sets,
        loss={name: statistics.median(text.loss(retained) for retained in sets) for name, text in texts.items()},
        gain={name: text.difference(middle[name], searched) for name, text in texts.items()},
    )


def _front(measured: Mapping[Retained, float]) -> dict[int, FrontPoint]:
    front: dict[int, FrontPoint] = {}
    lowest = float("inf")
    for size in sorted({len(retained) for retained in measured}):
        loss, retained = min((loss, retained) for retained, loss in measured.items() if len(retained) == size)
        if loss < lowest:
            front[size], lowest = FrontPoint(retained, loss), loss
    return front


def _cost(search: Search, layers: int) -> SearchCost:
    return SearchCost(search.evaluated_layers, len(search.measured), len(search.measured) * layers)


def profiles_of(folder: Path, own: Mapping[str, str]) -> dict[str, str]:
    """The profiles of the plan in a checkpoint's folder, if there is one, and the run's own over them.

    Raises:
        UserError: the plan's file is none.
    """
    file = folder / PLAN_FILE
    if not file.exists():
        return dict(own)
    try:
        return {**json.loads(file.read_bytes())["profiles"], **own}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is no plan of tools/plan_cache.py; make it again, or remove it") from None


def named_strategies(plan: CachePlan) -> dict[str, str]:
    """The profiles as strategies by name, as an export carries them; with the calibration text if there are several."""
    several = len(plan.cost) > 1
    return {
        f"{each.profile.name}-{each.calibration}" if several else each.profile.name: ",".join(map(str, each.retained))
        for each in plan.profiles
    }
