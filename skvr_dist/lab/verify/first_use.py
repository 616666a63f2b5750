"""NCCL's rule of first use, kept over gloo: what would hang on GPUs fails on a CPU, in moments and with a sentence.

NCCL connects ranks when they first talk. The first operation of a communicator that two ranks share, in a direction,
holds the host of each until both have issued it; the first collective, the hosts of all its members. gloo connects when
a group is made and holds nobody, so a program can run over gloo whose first step hangs over NCCL.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import device_mesh, distributed_c10d

_COLLECTIVES = [
    name
    for name in vars(dist.ProcessGroup)
    if name.lstrip("_").startswith(("all", "reduce", "broadcast", "gather", "scatter", "barrier"))
]


class NeverMet(Exception):
    """A rank waited at the first use of a communicator for another one that did not come."""


class FirstUses:
    """The first uses that are over: by group, and "collectives" or the direction between two ranks."""

    def __init__(self, seconds: float) -> None:
        self.met: set[tuple[str, str]] = set()
        self.connected_at_birth: set[str] = set()
        """Groups that stay on gloo where the others are on NCCL."""
        self._seconds = seconds
        self._store = dist.PrefixStore("first use", distributed_c10d._get_default_store())

    def meet(self, group: dist.ProcessGroup, how: str, ranks: Iterable[int], operation: str) -> None:
        """Wait, the first time, until all of `ranks` (numbers in the group) are here.

        Raises:
            NeverMet: some did not come in time.
        """
        if (group.group_name, how) in self.met or group.group_name in self.connected_at_birth:
            return
        place = f"{group.group_name}/{how}"
        self._store.set(f"{place}/{group.rank()}", "here")
        deadline = time.monotonic() + self._seconds
        for rank in ranks:
            left = max(0.01, deadline - time.monotonic())
            try:
                self._store.wait([f"{place}/{rank}"], timedelta(seconds=left))
            except dist.DistError as error:
                raise NeverMet(
                    f"rank {dist.get_rank()} waits at its first {operation} among ranks "
                    f"{dist.get_process_group_ranks(group)}: rank {dist.get_global_rank(group, rank)} did not come "
                    f"within {self._seconds:g} s"
                ) from error
        self.met.add((group.group_name, how))


@contextlib.contextmanager
def first_use_blocks(seconds: float = 30.0) -> Iterator[FirstUses]:
    """Let every group of the default backend obey the rule, whether this project, DeepSpeed or torch uses it.

    Per process: enter it on all ranks, after the process group has started. Groups that are made with `backend="gloo"`
    are left alone, as they are on GPUs.

    Args:
        seconds: the longest wait for others.
    """
    uses = FirstUses(seconds)
    methods = {name: dist.ProcessGroup.__dict__[name] for name in (*_COLLECTIVES, "send", "recv")}
    new_group = dist.new_group

    def collective(name: str) -> Callable[..., Any]:
        original = getattr(dist.ProcessGroup, name)

        def meet_and_call(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            uses.meet(group, "collectives", range(group.size()), name)
            return original(group, *args, **kwargs)

        return meet_and_call

    send, receive = dist.ProcessGroup.send, dist.ProcessGroup.recv

    def meet_and_send(group: dist.ProcessGroup, tensors: Any, to: int, *args: Any) -> Any:
        uses.meet(group, f"{group.rank()} to {to}", [group.rank(), to], "send")
        return send(group, tensors, to, *args)

    def meet_and_receive(group: dist.ProcessGroup, tensors: Any, source: int, *args: Any) -> Any:
        uses.meet(group, f"{source} to {group.rank()}", [source, group.rank()], "receive")
        return receive(group, tensors, source, *args)

    def make_and_note(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if kwargs.get("backend") == "gloo" and isinstance(group, dist.ProcessGroup):
            uses.connected_at_birth.add(group.group_name)
        return group

    replaced: dict[str, Callable[..., Any]] = {name: collective(name) for name in _COLLECTIVES}
    replaced |= {"send": meet_and_send, "recv": meet_and_receive}
    try:
        for name, method in replaced.items():
            setattr(dist.ProcessGroup, name, method)
        dist.new_group = device_mesh.new_group = make_and_note
        yield uses
    finally:
        for name, method in methods.items():
            setattr(dist.ProcessGroup, name, method)
        dist.new_group = device_mesh.new_group = new_group
