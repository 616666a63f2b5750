"""What one rank has met before the ranks meet, told to those that wait for it on other hosts.

Ranks look at folders, data and checkpoints before they join. What one host alone lacks would leave the others to wait
for the whole time-out, and to end with 75, as if starting again helped; a launcher that returns the largest code of
all hosts, as pdsh does, would hand that on. So the rank leaves its sentence in the store where the ranks are to meet,
and all end as it does. On one host the launcher ends the others, unless it is srun.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import Store

from skvr_dist.cluster.launcher import announced_local_size, announced_rank, announced_world_size
from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.parallel.engine.meeting_store import open_store

_SECONDS_TO_REACH = 20.0
"""For a rank to find the store of rank 0, which may have started later."""
_SECONDS_TO_HEAR = 15.0
"""For the others to come to a store that rank 0 holds up for them."""
_LOOK_SECONDS = 0.1


@contextlib.contextmanager
def telling_who_waits(folder: str) -> Iterator[None]:
    """Tell the ranks of all hosts what this one ends with inside, before they have met; it is raised on as it is.

    Args:
        folder: the run's `train.output_dir`, which tells its ranks from those of other runs at the same address.
    """
    try:
        yield
    except RunInterrupted:  # nothing that the others do not see themselves
        raise
    except Exception as error:
        if _others_are_left_waiting() and "MASTER_ADDR" in os.environ:
            with contextlib.suppress(Exception):  # nobody may be there to hear it
                _tell(folder, error)
        raise


def _others_are_left_waiting() -> bool:
    """Whether there are ranks that no launcher ends with this one: on other hosts, or srun's tasks on this one."""
    ranks = announced_world_size()
    return ranks > announced_local_size() or str(ranks) == os.environ.get("SLURM_STEP_NUM_TASKS")


def raise_what_is_told(store: Store, folder: str) -> None:
    """End as another rank of the run has.

    Raises:
        UserError: it has met something that a user can put in order.
        RunInterrupted: it has met something else.
    """
    if not store.check([_key(folder)]):
        return
    told = json.loads(store.get(_key(folder)))
    _hear(store, folder)
    kind = UserError if told["is_for_user"] else RunInterrupted
    raise kind(
        f"rank {announced_rank()} does not begin, because rank {told['rank']} on {told['host']} has ended: "
        f"{told['sentence']}"
    )


def _tell(folder: str, error: Exception) -> None:
    rank, text, is_for_user = announced_rank(), " ".join(str(error).split()), isinstance(error, UserError)
    sign = {
        "rank": rank,
        "host": socket.gethostname(),
        "sentence": text if is_for_user else f"{type(error).__name__}: {text}",
        "is_for_user": is_for_user,
    }
    store = open_store(rank, announced_world_size(), timedelta(seconds=_SECONDS_TO_REACH))
    store.compare_set(_key(folder), "", json.dumps(sign))  # what all meet the first one says
    _hear(store, folder)


def _hear(store: Store, folder: str) -> None:
    """Count this rank among those that know; rank 0, whose store it is, stays until all do."""
    count = f"{_key(folder)}/heard"
    deadline = time.monotonic() + _SECONDS_TO_HEAR
    known = store.add(count, 1)
    while announced_rank() == 0 and known < announced_world_size() and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        known = store.add(count, 0)


def _key(folder: str) -> str:
    return f"skvr/refused/{folder}"
