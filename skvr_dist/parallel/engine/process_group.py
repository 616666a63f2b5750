"""How a rank joins the others, through DeepSpeed: backend, time-out, and a store that belongs to one run."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import PrefixStore, Store, distributed_c10d
from torch.distributed.rendezvous import register_rendezvous_handler

from skvr_dist.cluster.launcher import (
    announced_local_size,
    announced_port,
    announced_rank,
    announced_world_size,
    free_port,
    host_of,
    was_launched,
)
from skvr_dist.cluster.mpi import announce_mpi_ranks
from skvr_dist.cluster.network import (
    address_towards,
    addresses,
    interface_of,
    is_loopback,
    leads_nowhere,
    resolve,
    use_interface,
    way_between,
)
from skvr_dist.errors import OneRankError, RunInterrupted, UserError
from skvr_dist.parallel.engine.meeting_store import DEFAULT_PORT, open_store
from skvr_dist.parallel.engine.refusals import raise_what_is_told

_RUN_SCHEME = "skvr-run"
_LOOK_SECONDS = 1.0  # between two looks whether a rank that is waited for has said why it does not come
_ASKING_A_SECOND = 64  # ranks that the store is to answer then
_MOST_NAMED = 8  # ranks in a sentence
_SECONDS_TO_NOTICE = 20.0  # ranks start within seconds of each other


def start_process_group(timeout: timedelta = timedelta(minutes=10), folder: str | None = None, run: str = "") -> None:
    """Join the process group of the launcher, or make one of this process alone: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout: the longest wait for another rank, in this group and those made later.
        folder: `train.output_dir` of the run, the same on all ranks. Ranks of two runs that meet at one address and
            port keep out of each other's way: all that a run's ranks tell each other to connect is under its id.
        run: that id; rank 0 tells the others.

    Raises:
        UserError: another process has come as this rank of this run, the environment is not that of a launcher, or
            another rank has ended before (`telling_who_waits`).
        RunInterrupted: not all ranks have come in time.
    """
    # DeepSpeed's calls, which torch names anew: a line per rank and call that no user can do anything about.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    on_gpu = get_accelerator().device_name() == "cuda"
    if not on_gpu:
        _share_cores()
    if not was_launched():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    # A shared-memory sum for inference on CPUs, which DeepSpeed would compile here, for a minute and with a compiler.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    port = announced_port(DEFAULT_PORT)
    announce_mpi_ranks(port)
    with contextlib.redirect_stdout(io.StringIO()), _naming_the_address(port, timeout):
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=timeout,
            distributed_port=port,
            verbose=False,
            init_method=None if folder is None else f"{_RUN_SCHEME}://{run}/{quote(folder, safe='')}",
        )
    use_timeout(timeout)


@contextlib.contextmanager
def _naming_the_address(port: int, timeout: timedelta) -> Iterator[None]:
    """Say in a sentence what is wrong with the place where ranks are to meet, or that not all have come."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:  # torch would ask again and again, until its time is up
        raise UserError(
            f"host {host} (MASTER_ADDR), where the ranks are to meet, has no address ({error.strerror}); give the "
            f"launcher another --master_addr, or name it in /etc/hosts"
        ) from None
    _require_way_to(host)
    rank, size = announced_rank(), announced_world_size()
    seconds = timeout.total_seconds()
    waits = f"rank {rank} waits for the other ranks at port {port} of {host}, {size} in all, up to {seconds:.0f} s"
    notice = threading.Timer(_SECONDS_TO_NOTICE, print, [waits], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            raise RunInterrupted(
                f"rank {rank} waited for {seconds:.0f} s at port {port} of {host}, but not all {size} ranks of this "
                f"run came; start them all, give each run a MASTER_PORT of its own, or unset WORLD_SIZE and the "
                f"variables beside it if they are left over"
            ) from None
        if "address already in use" not in text and "eaddrinuse" not in text:
            raise
        raise UserError(
            f"port {port} of {host}, where the ranks are to meet, is in use; give the launcher another --master_port, "
            f"or end what holds it"
        ) from None
    finally:
        notice.cancel()


def _require_way_to(host: str) -> None:
    """Refuse a place to meet that each of several hosts would look for on itself.

    Raises:
        UserError: it is the address of a bridge of containers.
    """
    address = resolve(host)
    interface = interface_of(address)
    if announced_world_size() > announced_local_size() and interface and interface != "lo" and leads_nowhere(interface):
        way = way_between(addresses(), [])
        raise UserError(
            f"MASTER_ADDR, where the ranks are to meet, is {address}, which is {interface} of {socket.gethostname()}: "
            f"no other host reaches that; give the launcher --master_addr with the name of the first host, or with its "
            f"address in the network that all hosts share{f' ({way} is one of this host)' if way else ''}"
        )


def _join_run(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's rendezvous by environment variables, in the part of the store that belongs to a run."""
    parts = urlsplit(url)
    folder = unquote(parts.path.removeprefix("/"))
    rank, world_size, timeout = announced_rank(), announced_world_size(), options["timeout"]
    meeting = open_store(rank, world_size, timeout)
    if rank == 0:
        meeting.set(_id_of(folder), parts.netloc)
    _await(meeting, {_id_of(folder): 0}, meeting, folder, timeout)
    run = meeting.get(_id_of(folder)).decode()
    store = PrefixStore(run, meeting)
    process = psutil.Process()
    mine = f"process {process.pid} on {socket.gethostname()}, started at {process.create_time():.2f}"
    store.set(f"way/{rank}", _way_here())
    came = store.compare_set(f"came/{rank}", "", mine).decode()
    if came != mine:
        raise OneRankError(
            f"rank {rank} of run {run} is {came}, and {mine} comes as the same; end the other start of this "
            f"run, or give each a MASTER_PORT of its own"
        )
    _await(store, {f"came/{other}": other for other in range(world_size)}, meeting, folder, timeout)
    _settle_interface(store, world_size)
    yield store, rank, world_size


def _id_of(folder: str) -> str:
    return f"skvr/run/{folder}"


def _await(store: Store, keys: Mapping[str, int], meeting: Store, folder: str, timeout: timedelta) -> None:
    """Wait until keys are set, each by the rank that belongs to it.

    Args:
        meeting: the whole store, where a rank that does not come says why.

    Raises:
        UserError: another rank has met something that a user can put in order.
        RunInterrupted: some have not come in time, or rank 0 has gone, who holds the store.
    """
    rank, world_size = announced_rank(), announced_world_size()
    look = max(_LOOK_SECONDS, world_size / _ASKING_A_SECOND)
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        while True:
            raise_what_is_told(meeting, folder)
            left = deadline - time.monotonic()
            with contextlib.suppress(dist.DistStoreError):  # time is up
                return store.wait(list(keys), timedelta(seconds=max(0.1, min(left, look))))
            if left <= look:
                break
        missing = [other for key, other in keys.items() if not store.check([key])]
    except RuntimeError as error:
        raise RunInterrupted(
            f"rank {rank} waited for the other ranks at port {os.environ['MASTER_PORT']} of "
            f"{os.environ['MASTER_ADDR']}, but rank 0 on {host_of(0)} has ended ({str(error).splitlines()[0][:200]}); "
            f"it says why; start the run again"
        ) from None
    names = ", ".join(f"{other} ({host_of(other)})" for other in missing[:_MOST_NAMED])
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    raise RunInterrupted(
        f"rank {rank} waited for {timeout.total_seconds():.0f} s at port {os.environ['MASTER_PORT']} of "
        f"{os.environ['MASTER_ADDR']}, but not all {world_size} ranks of this run came; start rank {names}{more} "
        f"too, look there for why it ended, give each run a MASTER_PORT of its own, or unset WORLD_SIZE and the "
        f"variables beside it if they are left over"
    )


def _way_here() -> str:
    """The first host's address as this host sees it; empty on that host itself, where its name may be a loopback's."""
    host = os.environ["MASTER_ADDR"]
    with contextlib.suppress(OSError):
        if not is_loopback(address_towards(host)):
            return resolve(host)
    return ""


def _settle_interface(store: Store, world_size: int) -> None:
    """Have gloo and NCCL use the interface by which the other hosts reach this one; all ranks have come."""
    if world_size <= announced_local_size():
        return
    mine = address_towards(os.environ["MASTER_ADDR"])
    if is_loopback(mine):
        ways = store.multi_get([f"way/{other}" for other in range(world_size)])
        mine = next((way.decode() for way in ways if way), mine)
    if (name := interface_of(mine)) and not is_loopback(mine):
        use_interface(name)


register_rendezvous_handler(_RUN_SCHEME, _join_run)


def use_timeout(timeout: timedelta) -> None:
    """Set the time-out of groups made from now on, DeepSpeed's too; by default some wait for half an hour."""
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def _share_cores() -> None:
    """Give each rank of this host its share of the cores, unless OMP_NUM_THREADS says otherwise.

    By default every rank would start a thread per core, and the ranks would fight for them.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // announced_local_size()))
