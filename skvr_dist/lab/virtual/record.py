"""Records what a rank asks of the others: collectives, sends and receives, with group, bytes and order; and waits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork

from skvr_dist.parallel import collectives

# What the methods of a process group begin with (`allgather`, `_allgather_base`, `all_gather_single`: versions differ),
# and the functions of torch.distributed that call them. The first that fits counts.
_NAMES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "reduce_scatter": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "receive",
}


def _name_of(method: str) -> str | None:
    return next((name for begin, name in _NAMES.items() if method.lstrip("_").startswith(begin)), None)


_METHODS = {method: name for method in vars(dist.ProcessGroup) if (name := _name_of(method))}


# Of `skvr_dist.parallel.collectives`: what they start calls no method of a process group.
_FUNCTIONS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Operation:
    """Something that a rank asks of others.

    Args:
        name: as in torch.distributed, without "into_tensor"; `send` and `receive` between two ranks.
        group: the group's name, which all its members know it by.
        ranks: the group's members, by their numbers in the world.
        bytes: of the tensors that this rank puts in; for `receive`, of those that it gets.
        peer: the other rank's number in the world, for `send` and `receive`.
        where: file and function that asked for it.
    """

    name: str
    group: str
    ranks: tuple[int, ...]
    bytes: int
    peer: int | None
    where: str


@dataclass(frozen=True)
class Wait:
    """The rank goes no further until an operation is done."""

    operation: int
    """Its number among the operations, from 0."""


Event = Operation | Wait


class Recorder:
    """Notes what is asked within, in `events`.

    Args:
        make_up: fill in what other ranks would have sent, for a fake process group, on which nothing arrives: what is
            gathered is this rank's own for every member, but for counters (float64) that are zero here, since other
            ranks have something of them; what is scattered this rank's own share, what is received zeros; broadcasts
            and sums stay what they were.
    """

    def __init__(self, make_up: bool) -> None:
        self.events: list[Event] = []
        self._make_up = make_up
        self._operations = 0
        self._asked: dict[int, tuple[Any, int]] = {}  # by id of the handle, which is kept so that its id stays its own
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Recorder:
        for method, name in _METHODS.items():
            self._replace(dist.ProcessGroup, method, functools.partial(self._asking, name))
        for name in _FUNCTIONS:
            self._replace(collectives, name, functools.partial(self._calling, name))
        for kind in (dist.Work, FakeWork):
            self._replace(kind, "wait", self._waiting)
        return self

    def __exit__(self, *error: Any) -> None:
        for kind, method, original in reversed(self._originals):
            setattr(kind, method, original)
        self._originals = []

    def _replace(self, kind: Any, method: str, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._originals.append((kind, method, kind.__dict__[method]))
        setattr(kind, method, by(getattr(kind, method)))

    def _asking(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def ask(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            handle = original(group, *args, **kwargs)
            self._asked[id(handle)] = handle, self._operations
            self._note(name, group, args)
            return handle

        return ask

    def _calling(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A collective that no method of a process group is called for, and whose result is waited for."""

        def call(x: Tensor, group: dist.ProcessGroup) -> Tensor:
            ranks = tuple(dist.get_process_group_ranks(group))
            self.events.append(Operation(name, group.group_name, ranks, x.nbytes, None, _caller()))
            self.events.append(Wait(self._operations))
            self._operations += 1
            return _made_up(name, x, ranks) if self._make_up else original(x, group)

        return call

    def _waiting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(handle: dist.Work, *args: Any, **kwargs: Any) -> Any:
            if id(handle) in self._asked:
                self.events.append(Wait(self._asked.pop(id(handle))[1]))
            return original(handle, *args, **kwargs)

        return wait

    def _note(self, name: str, group: dist.ProcessGroup, args: tuple[Any, ...]) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        first = list(_tensors(args[0])) if args else []
        put_in = list(_tensors(args[1])) if name in ("all_gather", "reduce_scatter") else first
        if self._make_up:
            _fill(name, first, put_in, ranks)
        peer = ranks[args[1]] if name in ("send", "receive") else None
        size = sum(tensor.nbytes for tensor in put_in)
        self.events.append(Operation(name, group.group_name, ranks, size, peer, _caller()))
        self._operations += 1


def _made_up(name: str, x: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """What a collective would return if all ranks had given this one's tensor; of sums, this rank's part."""
    if name == "all_gather":
        return torch.cat([x] * len(ranks))
    if name == "reduce_scatter":
        return x.chunk(len(ranks))[ranks.index(dist.get_rank())].contiguous()
    return x.clone()


def _tensors(arg: Any) -> Iterator[Tensor]:
    if isinstance(arg, Tensor):
        yield arg
    elif isinstance(arg, list | tuple):
        for each in arg:
            yield from _tensors(each)


def _fill(name: str, results: list[Tensor], put_in: list[Tensor], ranks: tuple[int, ...]) -> None:
    if name == "receive":
        for tensor in results:
            tensor.zero_()
    elif name == "all_gather" and len(results) == len(put_in):  # one tensor for all members
        for whole, mine in zip(results, put_in, strict=True):
            for part in whole.view(-1).chunk(len(ranks)):
                part.copy_(mine.reshape(-1)[: part.numel()])
    elif name == "all_gather":
        for part in results:
            part.copy_(put_in[0])
            if part.dtype == torch.float64 and len(ranks) > 1:
                part.masked_fill_(part == 0, 1.0)
    elif name == "reduce_scatter":
        place = ranks.index(dist.get_rank())
        if len(results) == len(put_in):
            for mine, whole in zip(results, put_in, strict=True):
                mine.view(-1).copy_(whole.reshape(-1)[place * mine.numel() :][: mine.numel()])
        else:
            results[0].copy_(put_in[place])


def _caller() -> str:
    """The file and function of this project, or of DeepSpeed, that asks."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        ours = "skvr_dist" in file and "lab/virtual" not in file
        if ours or ("deepspeed" in file and "deepspeed/comm" not in file and not file.endswith("nvtx.py")):
            return f"{'/'.join(file.split('/')[-2:])}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
