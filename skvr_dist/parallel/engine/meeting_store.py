"""The store where the ranks of a run meet: how each comes to it, and who holds it."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from skvr_dist.cluster.launcher import announced_port
from skvr_dist.errors import OneRankError

DEFAULT_PORT = 29500
"""DeepSpeed's."""
_LOOK_SECONDS = 1.0
_SECONDS_TO_ANSWER = 60.0  # of a store that listens


def open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store at the announced address, of torchrun's agent or of rank 0, which waits for nobody yet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return next(rendezvous("env://", timeout=timeout))[0]
    host, port = os.environ["MASTER_ADDR"], announced_port(DEFAULT_PORT)

    def connect() -> Store:
        return TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True)

    return connect() if rank == 0 else _connected(connect, host, port, timeout)


def _connected(connect: Callable[[], Store], host: str, port: int, timeout: timedelta) -> Store:
    """What `connect` returns. Where something else listens, torch would wait for its answer without end.

    Raises:
        OneRankError: something else does.
    """
    ended: queue.SimpleQueue[Store | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            ended.put(connect())
        except Exception as error:
            ended.put(error)

    threading.Thread(target=work, daemon=True).start()
    deadline = None
    while True:
        with contextlib.suppress(queue.Empty):
            result = ended.get(timeout=_LOOK_SECONDS)
            if isinstance(result, Exception):
                raise result
            return result
        if deadline is None and _listens(host, port):
            deadline = time.monotonic() + min(_SECONDS_TO_ANSWER, timeout.total_seconds())
        elif deadline is not None and time.monotonic() > deadline:
            raise OneRankError(
                f"what listens at port {port} of {host}, where the ranks are to meet, is not rank 0 of a run: it does "
                f"not answer; end it, or give the launcher another --master_port"
            )


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), _LOOK_SECONDS):
        return True
    return False
