"""How a rank joins the others, through DeepSpeed: backend, time-out, and a store that belongs to one run."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import deepspeed
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import PrefixStore, Store, distributed_c10d
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from skvr_dist.cluster.launcher import (
    announced_local_size,
    announced_port,
    announced_rank,
    announced_world_size,
    free_port,
    was_launched,
)
from skvr_dist.errors import OneRankError, RunInterrupted, UserError

_DEFAULT_PORT = 29500  # DeepSpeed's
_RUN_SCHEME = "skvr-run"
_SECONDS_TO_NOTICE = 20.0  # ranks start within seconds of each other


def start_process_group(timeout: timedelta = timedelta(minutes=10), run: str | None = None) -> None:
    """Join the process group of the launcher, or make one of this process alone: NCCL on GPUs, gloo on CPUs.

    Args:
        timeout: the longest wait for another rank, in this group and those made later.
        run: id of the run, the same on all ranks. Ranks of two runs that meet at one address and port keep out of each
            other's way: all that a run's ranks tell each other to connect is under its id.

    Raises:
        UserError: another process has come as this rank of this run, or the environment is not that of a launcher.
        RunInterrupted: not all ranks have come in time.
    """
    # DeepSpeed's calls, which torch names anew: a line per rank and call that no user can do anything about.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    on_gpu = get_accelerator().device_name() == "cuda"
    if not on_gpu:
        _share_cores()
    if not was_launched():
        _refuse_bare_slurm_tasks()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    # A shared-memory sum for inference on CPUs, which DeepSpeed would compile here, for a minute and with a compiler.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # Under mpirun DeepSpeed would overwrite MASTER_PORT, and two runs on a host would meet on one port.
    port = announced_port(_DEFAULT_PORT)
    with contextlib.redirect_stdout(io.StringIO()), _naming_the_address(port, timeout):
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            timeout=timeout,
            distributed_port=port,
            verbose=False,
            init_method=None if run is None else f"{_RUN_SCHEME}://{run}",
        )
    use_timeout(timeout)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        # DeepSpeed numbers the ranks of a host by world rank. Open MPI need not, and DeepSpeed's engine then refuses.
        os.environ["LOCAL_RANK"] = os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]


def _refuse_bare_slurm_tasks() -> None:
    """Refuse tasks that srun started without a launcher. In an allocation's own shell Slurm has variables too."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f"Slurm started {tasks} tasks, but no launcher announced their ranks; start one task per node that runs "
            f"deepspeed or torchrun, or use mpirun"
        )


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


def _join_run(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's rendezvous by environment variables, in the part of the store that belongs to a run."""
    parts = urlsplit(url)
    store, rank, world_size = next(rendezvous(f"env://?{parts.query}", **options))
    store = PrefixStore(parts.netloc, store)
    process = psutil.Process()
    mine = f"process {process.pid} on {socket.gethostname()}, started at {process.create_time():.2f}"
    came = store.compare_set(f"came/{rank}", "", mine).decode()
    if came != mine:
        raise OneRankError(
            f"rank {rank} of run {parts.netloc} is {came}, and {mine} comes as the same; end the other start of this "
            f"run, or give each a MASTER_PORT of its own"
        )
    yield store, rank, world_size


register_rendezvous_handler(_RUN_SCHEME, _join_run)


def use_timeout(timeout: timedelta) -> None:
    """Set the time-out of groups made from now on, DeepSpeed's too; by default some wait for half an hour."""
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def _share_cores() -> None:
    """Give each rank of this host its share of the cores, unless OMP_NUM_THREADS says otherwise.

    By default every rank would start a thread per core, and the ranks would fight for them.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // announced_local_size()))
