"""Records what a rank asks of the others: collectives, sends and receives, with group, bytes and order; and waits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

# c10d's operators, by the names of the functions in torch.distributed that call them.
_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv_": "receive",
}
_ISSUING = [
    name
    for name in vars(dist.ProcessGroup)
    if name.lstrip("_").startswith(("all", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv"))
]


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


class Recorder(TorchDispatchMode):
    """Notes what is asked within, in `events`.

    Args:
        make_up: fill in what other ranks would have sent, for a fake process group, on which nothing arrives: what is
            gathered is this rank's own for every member, what is scattered this rank's own share, what is received
            zeros; broadcasts and sums stay what they were, but for counters (float64) that are zero here, since other
            ranks add something to them.
    """

    def __init__(self, make_up: bool) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._make_up = make_up
        self._operations = 0
        self._asked: dict[int, tuple[Any, int]] = {}  # by id of the handle, which is kept so that its id stays its own
        self._replaced: contextlib.ExitStack | None = None

    def __enter__(self) -> Recorder:
        self._replaced = contextlib.ExitStack()
        self._replaced.enter_context(self._noting_waits())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._replaced is not None
        self._replaced.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and func._opname in _NAMES:
            self._note(_NAMES[func._opname], args)
        return result

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if _is_group(arg))
        ranks = tuple(dist.get_process_group_ranks(group))
        first = list(_tensors(args[0]))
        put_in = list(_tensors(args[1])) if name in ("all_gather", "reduce_scatter") else first
        if self._make_up:
            _fill(name, first, put_in, ranks)
        peer = ranks[args[2]] if name in ("send", "receive") else None
        size = 0 if name == "barrier" else sum(tensor.nbytes for tensor in put_in)
        self.events.append(Operation(name, group.group_name, ranks, size, peer, _caller()))
        self._operations += 1

    @contextlib.contextmanager
    def _noting_waits(self) -> Iterator[None]:
        """Let the handles of operations tell when somebody waits for them."""
        originals = {name: dist.ProcessGroup.__dict__[name] for name in _ISSUING}
        waits = {kind: kind.wait for kind in (dist.Work, FakeWork)}

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            def ask(*args: Any, **kwargs: Any) -> Any:
                before = self._operations
                handle = original(*args, **kwargs)
                if self._operations > before:
                    self._asked[id(handle)] = handle, self._operations - 1
                return handle

            return ask

        def note_and_wait(handle: dist.Work, *args: Any) -> Any:
            if id(handle) in self._asked:
                self.events.append(Wait(self._asked.pop(id(handle))[1]))
            return next(waits[kind] for kind in type(handle).__mro__ if kind in waits)(handle, *args)

        try:
            for name in _ISSUING:
                setattr(dist.ProcessGroup, name, noting(getattr(dist.ProcessGroup, name)))
            for kind in waits:
                setattr(kind, "wait", note_and_wait)  # noqa: B010
            yield
        finally:
            for name, original in originals.items():
                setattr(dist.ProcessGroup, name, original)
            for kind, wait in waits.items():
                setattr(kind, "wait", wait)  # noqa: B010


def _is_group(arg: Any) -> bool:
    return isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith("ProcessGroup")


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
    elif name == "all_reduce":
        for tensor in results:
            if tensor.dtype == torch.float64:
                tensor.masked_fill_(tensor == 0, len(ranks))
    elif name == "all_gather" and len(results) == len(put_in):  # one tensor for all members
        for whole, mine in zip(results, put_in, strict=True):
            for part in whole.view(-1).chunk(len(ranks)):
                part.copy_(mine.reshape(-1)[: part.numel()])
    elif name == "all_gather":
        for part in results:
            part.copy_(put_in[0])
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
