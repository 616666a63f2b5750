"""What a rank says when another one has died or is stuck.

A collective that fails or times out knows neither which rank is missing nor what it was for. The engine names the
operation (`naming_the_operation`). The rank that notices hangs up on all others, so that they notice too, and so on
through the whole run within moments. Then every rank that is still there leaves a sign of life in the store of the
process group, and the ranks without one are named.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from skvr_dist.errors import RunInterrupted
from skvr_dist.parallel.mesh import Mesh

# Time from hanging up to naming the ranks that gave no sign. Launchers kill the ranks that are left 30 s after the
# first has ended.
_ROLL_CALL_SECONDS = 5.0


@contextlib.contextmanager
def naming_the_operation(mesh: Mesh, operation: str, micro_batch: int | None = None) -> Iterator[None]:
    """Turn the failure of a collective within into a sentence.

    Raises:
        RunInterrupted: names this rank, the operation and the ranks that gave no sign of life.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one, and gloo raises plain ones
        if not _is_of_a_collective(error):
            raise
        of = "" if micro_batch is None else f" of micro-batch {micro_batch}"
        _hang_up()
        missing = _missing_ranks(mesh)
        silent = f"no sign of life from rank {', '.join(map(str, missing))}" if missing else "all ranks are alive"
        reason = " ".join(str(error).split())[:200]
        sentence = (
            f"{mesh.name} failed in {operation}{of}: {silent} ({reason}); start the run again, it resumes from the "
            f"latest checkpoint"
        )
        logging.getLogger("skvr_dist").error(sentence)
        raise RunInterrupted(sentence) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "timed out", "connection closed", "connection reset", "broken pipe")
    )


def _hang_up() -> None:
    """Close this process's connections to the other ranks, but not those to the store.

    A rank that waits for this one would otherwise notice only when its own operation times out.
    """
    store = int(os.environ["MASTER_PORT"])
    for connection in psutil.Process().net_connections(kind="tcp"):
        if connection.status == psutil.CONN_ESTABLISHED and store not in (connection.laddr.port, connection.raddr.port):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as connected:
                connected.shutdown(socket.SHUT_RDWR)


def _missing_ranks(mesh: Mesh) -> list[int]:
    """Ranks that do not report. The store lives on rank 0, which may end first or be the one that died."""
    missing = set(range(mesh.world_size)) - {mesh.rank}
    deadline = time.monotonic() + _ROLL_CALL_SECONDS
    try:
        store = distributed_c10d._get_default_store()
        store.set(f"skvr/alive/{mesh.rank}", "yes")
    except RuntimeError:
        return [0]
    with contextlib.suppress(RuntimeError):
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"skvr/alive/{rank}"])}
            time.sleep(0.1)
    return sorted(missing)
