"""What a rank says when another one has died, is stuck, or has met something that ends it.

A collective that fails or times out knows neither which rank is missing nor what it was for. The engine and the loop
name the operation (`naming_the_operation`). The rank that notices hangs up on all others, so that they notice too, and
so on through the whole run within moments. Then every rank that is still there leaves a sign of life in the store of
the process group, and the ranks without one are named, host by host.

A rank that meets something of its own, such as a full disk, hangs up too, and its sign of life is its sentence
(`ending_together`): so all ranks say why, and end as that one does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
from collections.abc import Iterator

import psutil
import torch.distributed as dist
from torch.distributed import distributed_c10d

from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.parallel.roll_call import Sign, call_the_roll, name_the_silent

# Time from hanging up to naming the ranks that gave no sign. Launchers kill the ranks that are left 30 s after the
# first has ended.
_ROLL_CALL_SECONDS = 5.0
# The same for a rank that hangs up for something of its own: the others may be computing and not look at a connection
# before their next collective.
_LAST_WORDS_SECONDS = 20.0

# Beyond that time, for a store that is busy with many ranks.
_SECONDS_FOR_THE_STORE = 4.0


class EndedByAnotherRankError(UserError):
    """Another rank has met something that a user can put in order; the message holds that rank's sentence."""


@contextlib.contextmanager
def naming_the_operation(mesh: Mesh, operation: str, micro_batch: int | None = None) -> Iterator[None]:
    """Turn the failure of a collective within into a sentence.

    Raises:
        RunInterrupted: names this rank, the operation and the ranks that gave no sign of life.
        EndedByAnotherRankError: another rank has ended with a sentence (`ending_together`), which this one repeats.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one, and gloo raises plain ones
        if not _is_of_a_collective(error):
            raise
        _refuse_few_files(error)
        of = "" if micro_batch is None else f" of micro-batch {micro_batch}"
        _hang_up()
        signs = _call_the_roll(mesh, Sign(), _ROLL_CALL_SECONDS)
        ending = _ending(mesh, f"{operation}{of}", " ".join(str(error).split())[:200], signs)
        logging.getLogger("skvr_dist").error(ending)
        raise ending from error


def _ending(mesh: Mesh, operation: str, reason: str, signs: dict[int, Sign]) -> UserError:
    """What a rank ends with whose operation has failed, told by the signs of all."""
    for rank, sign in sorted(signs.items()):
        if sign.sentence:
            kind = EndedByAnotherRankError if sign.is_for_user else RunInterrupted
            return kind(f"{mesh.name} ends in {operation}, because rank {rank} has ended: {sign.sentence}")
    missing = sorted(set(range(mesh.world_size)) - signs.keys())
    silent = name_the_silent(missing, mesh.hosts) if missing else "all ranks are alive"
    return RunInterrupted(
        f"{mesh.name} failed in {operation}: {silent} ({reason}); start the run again, it resumes from the latest "
        f"checkpoint"
    )


@contextlib.contextmanager
def naming_the_meeting(rank: int) -> Iterator[None]:
    """Turn the failure of a collective into a sentence while there is no mesh to name the missing ranks by.

    Raises:
        RunInterrupted: another rank has gone, or is stuck.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        _refuse_few_files(error)
        reason = " ".join(str(error).split())[:200]
        raise RunInterrupted(
            f"rank {rank} could not connect to the others, of which one has ended or is stuck ({reason}); start the "
            f"run again"
        ) from error


@contextlib.contextmanager
def ending_together(mesh: Mesh) -> Iterator[None]:
    """End all ranks when this one meets something of its own within, and let them say what it was.

    The error is raised on as it is. Collectives that fail without `naming_the_operation` are named as work of the run.
    """
    try:
        with naming_the_operation(mesh, "the run"):
            yield
    except (RunInterrupted, EndedByAnotherRankError):  # all ranks know
        raise
    except Exception as error:
        if mesh.world_size > 1:
            text = " ".join(str(error).split())
            is_for_user = isinstance(error, UserError)
            sentence = text if is_for_user else f"{type(error).__name__}: {text}"
            _hang_up()
            _call_the_roll(mesh, Sign(sentence, is_for_user), _LAST_WORDS_SECONDS)
        raise


def _refuse_few_files(error: RuntimeError) -> None:
    """Refuse a limit of open files that connections to the other ranks do not fit in.

    Raises:
        UserError: that is what the collective has failed of; starting again would not help.
    """
    if "Too many open files" in str(error) and "in system" not in str(error):  # that would be the host's own limit
        few, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise UserError(
            f"a process on {socket.gethostname()} may have {few} files and connections open, and a rank needs more; "
            f"raise that before the start: ulimit -n 65536"
        ) from error


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


def _call_the_roll(mesh: Mesh, mine: Sign, seconds: float) -> dict[int, Sign]:
    """The signs of the ranks that leave one within `seconds`, this one's among them.

    The store lives on rank 0, which may be the one that died: then all others are taken to be there. So they are when
    it does not answer, stopped or behind a link that is cut: a call to the store then waits for ever, so it is made on
    a thread that nobody waits for any longer than that.
    """
    found: list[dict[int, Sign]] = []

    def call() -> None:
        with contextlib.suppress(RuntimeError, ValueError):  # the latter once the process group is destroyed
            store = distributed_c10d._get_default_store()
            found.append(call_the_roll(store, mesh.rank, mesh.world_size, mine, seconds))

    caller = threading.Thread(target=call, name="roll call", daemon=True)
    caller.start()
    caller.join(seconds + _SECONDS_FOR_THE_STORE)
    return found[0] if found else {rank: Sign() for rank in range(1, mesh.world_size)}
