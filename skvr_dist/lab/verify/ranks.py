"""Run a function on several ranks of this machine over gloo, each a real process.

A fork server imports torch and DeepSpeed once, and what the modules of tests import; every rank is a fork of it, so a
run starts with a clean process group and clean module state, in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from skvr_dist.cluster.launcher import free_port

# Each rank imports the module of the function that it calls, and so what that imports: of tests these, for up to 4 s.
_IMPORTED_BY_CALLERS = (
    "pytest",
    "hypothesis",
    "peft",
    "transformers.models.auto.modeling_auto",
    "transformers.trainer",
)


@functools.cache
def fork_server() -> ForkServerContext:
    """Where processes come from that have everything imported, with one thread for torch."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the fork server, whose imports read it
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    preload = ["skvr_dist.train.loop", "skvr_dist.lab.verify.measure"]
    preload += [name for name in _IMPORTED_BY_CALLERS if name in sys.modules]
    context.set_forkserver_preload([*preload, "skvr_dist.parallel.engine.preload"])  # the last, for it freezes
    return context


class RankError(Exception):
    """A rank raised, died or did not finish in time."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120.0, may_die: bool = False
) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh process group; returns what each returned, by rank.

    `function` must be importable (defined at the top of a module); results must be picklable. With `may_die`, a rank
    that ends without a result returns None.

    Raises:
        RankError: a rank raised, died or took longer than `seconds`; the others are killed.
    """
    port = free_port()
    calls = [(_rank, (rank, world_size, port, function, args)) for rank in range(world_size)]
    return _run_processes(calls, seconds, may_die)


def run_alone(function: Callable[..., Any], *args: Any, seconds: float = 120.0) -> Any:
    """Call `function(*args)` in a fresh process without a process group; returns what it returned.

    Raises:
        RankError: it raised, died or took longer than `seconds`.
    """
    return _run_processes([(function, args)], seconds, may_die=False)[0]


def _run_processes(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]], seconds: float, may_die: bool) -> list[Any]:
    context = fork_server()
    processes, connections = [], []
    for function, args in calls:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_call, args=(sender, function, args), daemon=True)
        with ctrl_c_for_this_process_alone():
            process.start()
        sender.close()
        processes.append(process)
        connections.append(receiver)
    seconds_to_end = 0.0
    try:
        results = _collect(processes, connections, seconds, may_die)
        seconds_to_end = 5.0
        return results
    finally:
        for process in processes:
            process.join(timeout=seconds_to_end)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def ctrl_c_for_this_process_alone() -> Iterator[None]:
    """Start processes to which Ctrl-C does not come: a terminal sends it to all, and the parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(
    processes: Sequence[BaseProcess], connections: list[Connection], seconds: float, may_die: bool
) -> list[Any]:
    results: dict[Connection, Any] = {}
    deadline = time.monotonic() + seconds
    while len(results) < len(connections):
        waiting = [c for c in connections if c not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [connections.index(c) for c in waiting]
            raise RankError(f"ranks {late} did not finish within {seconds:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            try:
                failed, value = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False)
            except EOFError:
                if may_die:
                    results[connection] = None
                    continue
                rank = connections.index(connection)
                raise RankError(f"rank {rank} died without a result: {_end_of(processes[rank])}") from None
            if failed:
                raise RankError(f"rank {connections.index(connection)} raised:\n{value}")
            results[connection] = value
    return [results[connection] for connection in connections]


def _end_of(process: BaseProcess) -> str:
    """How a process ended that has closed its connection."""
    process.join(timeout=5)
    code = process.exitcode
    if code is None:
        return "it lives, but has closed its connection"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from skvr_dist.parallel.engine.process_group import start_process_group

    start_process_group()
    return function(*args)


def _call(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        outcome = (False, function(*args))
    except BaseException:
        outcome = (True, traceback.format_exc())
    try:
        # As bytes: tensors would otherwise be handed over by descriptors that die with this process.
        buffer = io.BytesIO()
        torch.save(outcome, buffer)
        sender.send_bytes(buffer.getvalue())
    finally:
        sender.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
