"""The ranks that mpirun started, asked of MPI itself: Open MPI and MPICH announce no place where the ranks are to meet.

DeepSpeed would take the first address that `hostname -I` gives on rank 0's host, which may be docker's bridge.
"""

from __future__ import annotations

import os
import socket

from skvr_dist.cluster.network import addresses, leads_nowhere, way_between

_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_INTERFACES = "OMPI_MCA_btl_tcp_if_"  # `include` or `exclude`, which Open MPI takes one of
_NEITHER = "127.0.0.1/8,sppp"  # what it excludes by default
_LOCAL_RANK = "OMPI_COMM_WORLD_LOCAL_RANK"


def announce_mpi_ranks(port: int) -> None:
    """Set the variables that torch reads, where mpirun started this rank and nobody has set them; collective.

    Args:
        port: where the ranks are to meet.
    """
    if "RANK" in os.environ or not any(os.environ.get(name, "1") != "1" for name in _VARIABLES):
        return
    _keep_off_bridges()
    from mpi4py import MPI  # starts MPI

    world = MPI.COMM_WORLD
    rank = world.Get_rank()
    hosts = world.allgather((socket.gethostname(), addresses()))
    names = [name for name, _ in hosts]
    others = [known for name, known in hosts if name != names[0]]
    meeting = way_between(hosts[0][1], others) if others else "127.0.0.1"
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world.Get_size()),
        LOCAL_RANK=os.environ.get(_LOCAL_RANK, str(names[:rank].count(names[rank]))),
        LOCAL_WORLD_SIZE=str(names.count(names[rank])),
        MASTER_ADDR=os.environ.get("MASTER_ADDR") or meeting or names[0],
        MASTER_PORT=str(port),
    )


def _keep_off_bridges() -> None:
    """Have Open MPI not connect over bridges of containers, where each host would find itself, and wait for ever."""
    bridges = [name for name in addresses() if name != "lo" and leads_nowhere(name)]
    if bridges and not any(name.startswith(_INTERFACES) for name in os.environ):
        os.environ[f"{_INTERFACES}exclude"] = ",".join([_NEITHER, *bridges])
