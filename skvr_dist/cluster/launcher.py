"""What the launcher told this process about the ranks it started, through environment variables.

Slurm's tasks are ranks too: `adopt_slurm_tasks` puts what srun says of them into the variables that torch reads.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket

from skvr_dist.cluster.slurm import expand, hosts_of_tasks, tasks_as_ranks
from skvr_dist.errors import OneRankError, UserError

# Launchers announce ranks and their number under different names: torchrun and deepspeed, Open MPI, MPICH.
_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_WORLD_SIZE_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
HOSTS_VARIABLE = "SKVR_HOSTS"
"""Names of the hosts, with commas between, in the order of their ranks: `launch/deepspeed.sh` sets it."""
_LOCAL_SIZE_VARIABLES = ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_SCHEDULERS = ("OMPI_COMM_WORLD_", "PMI_", "MPI_LOCAL", "SLURM_STEP_NUM_TASKS")
# Above the ports of common services, below those that Linux hands out (ip_local_port_range begins at 32768).
_PORTS = range(10_000, 32_768)


def adopt_slurm_tasks() -> None:
    """Announce the tasks that srun started as ranks, if it did and no other launcher among them has announced its own.

    Raises:
        UserError: Slurm's variables make no sense.
    """
    os.environ.update(tasks_as_ranks())


def was_launched() -> bool:
    """Whether a launcher announced its ranks to this process: more than one, or one with all that belongs to it."""
    if announced_world_size() > 1:
        return True
    whole = all(name in os.environ for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return whole and os.environ.get("RANK") == "0"


def is_other_rank() -> bool:
    """Whether a launcher started this process as another rank than the first of its host."""
    try:
        return _first_number(_WORLD_SIZE_VARIABLES, 1) > 1 and _first_number(LOCAL_RANK_VARIABLES, 0) != 0
    except UserError:
        return False


def announced_port(otherwise: int) -> int:
    """The port where the ranks are to meet.

    Raises:
        UserError: MASTER_PORT is no port.
    """
    port = _first_number(("MASTER_PORT",), otherwise)
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT in the environment is {port}; a port is from 1 to {2**16 - 1}")
    return port


def announced_world_size() -> int:
    """Ranks that the launcher started, known before any process group exists; 1 without a launcher.

    Raises:
        OneRankError: the variables are not those of a launcher that runs: some are left over, or were set by hand.
    """
    size = _first_number(_WORLD_SIZE_VARIABLES, 1)
    if size == 1:
        return 1
    named = next(name for name in _WORLD_SIZE_VARIABLES if name in os.environ)
    way_out = f"unset {named} if it is left over, or start the ranks with deepspeed, torchrun or mpirun"
    if size < 1:
        raise OneRankError(f"{named} in the environment is {size}, which is no number of ranks; {way_out}")
    for variables in (_RANK_VARIABLES, LOCAL_RANK_VARIABLES):
        if not any(name in os.environ for name in variables):
            raise OneRankError(
                f"{named} in the environment announces {size} ranks, but {variables[0]} is not there, which every "
                f"launcher sets; {way_out}"
            )
    if not 0 <= (rank := _first_number(_RANK_VARIABLES, 0)) < size:
        raise OneRankError(f"{named} in the environment announces {size} ranks, but this is rank {rank}; {way_out}")
    if named == "WORLD_SIZE" and "MASTER_ADDR" not in os.environ:
        raise OneRankError(
            f"{named} in the environment announces {size} ranks, but no MASTER_ADDR where they meet; {way_out}"
        )
    return size


def announced_rank() -> int:
    """This process's rank as the launcher numbers it; 0 without a launcher, whatever is left over."""
    return _first_number(_RANK_VARIABLES, 0) if announced_world_size() > 1 else 0


def announced_local_size() -> int:
    """Ranks that the launcher started on this host; 1 without a launcher."""
    return _first_number(_LOCAL_SIZE_VARIABLES, 1)


def host_of(rank: int) -> str:
    """A rank's host in words: its name, where the launcher named the hosts, or its number, counted from 1."""
    try:
        of_tasks = hosts_of_tasks()
    except ValueError:  # left-over variables; this words another error
        of_tasks = []
    if len(of_tasks) == _first_number(_WORLD_SIZE_VARIABLES, 1):  # a task is a rank; else it has started several
        return of_tasks[rank]
    number = rank // max(1, announced_local_size())
    names = os.environ.get(HOSTS_VARIABLE, "").split(",")
    if names == [""] and "SLURM_STEP_NODELIST" in os.environ:
        names = expand(os.environ["SLURM_STEP_NODELIST"])
    if number < len(names) and names[number]:
        return names[number]
    return f"host number {number + 1}"


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
                raise OneRankError(
                    f"{name} in the environment is {os.environ[name]!r}, no number; unset it or let a launcher set it"
                ) from None
    return otherwise


def is_of_a_launcher(variable: str) -> bool:
    """Whether a launcher may have told this process so of its own rank."""
    return variable in _OF_LAUNCHERS or variable.startswith(_OF_SCHEDULERS)
