"""What the launcher told this process about the ranks it started, through environment variables."""

from __future__ import annotations

import contextlib
import os
import random
import socket

from skvr_dist.errors import UserError

# Launchers announce ranks and their number under different names: torchrun and deepspeed, Open MPI, MPICH.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
# Above the ports of common services, below those that Linux hands out (ip_local_port_range begins at 32768).
_PORTS = range(10_000, 32_768)


def was_launched() -> bool:
    """Whether a launcher announced its ranks to this process."""
    return any(name in os.environ for name in _WORLD_SIZE_VARIABLES)


def announced_world_size() -> int:
    """Ranks that the launcher started, known before any process group exists; 1 without a launcher."""
    return _first_number(_WORLD_SIZE_VARIABLES, 1)


def announced_rank() -> int:
    """This process's rank as the launcher numbers it; 0 without a launcher."""
    return _first_number(_RANK_VARIABLES, 0)


def announced_local_size() -> int:
    """Ranks that the launcher started on this host; 1 without a launcher."""
    return _first_number(_LOCAL_SIZE_VARIABLES, 1)


def free_port() -> int:
    """A port of this host that nothing listens on, and that the system gives to nobody by itself.

    A port of the system's choice (port 0) would be one that it may hand to any connection opened before a rank listens.

    Raises:
        UserError: none of many is free.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise UserError(f"none of 100 ports in {_PORTS} is free; name one that is in MASTER_PORT")


def _first_number(variables: tuple[str, ...], otherwise: int) -> int:
    """The first of these variables that is set.

    Raises:
        UserError: it is no number.
    """
    for name in variables:
        if name in os.environ:
            try:
                return int(os.environ[name])
            except ValueError:
                raise UserError(
                    f"{name} in the environment is {os.environ[name]!r}, no number; unset it or let a launcher set it"
                ) from None
    return otherwise
