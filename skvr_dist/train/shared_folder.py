"""Whether all hosts see the run's folder, found when a run starts: otherwise its first checkpoint would be in parts."""

from __future__ import annotations

import socket
import time
import uuid

from torch.distributed import distributed_c10d

from skvr_dist.errors import UserError
from skvr_dist.run.folder import RunFolder

_KEY = "skvr/start"
_PATIENCE_SECONDS = 20.0  # a network's file system may take a moment
_LOOK_SECONDS = 0.1


def require_shared_folder(folder: RunFolder, rank: int, world_size: int) -> None:
    """Have rank 0 note a token in the run's folder and the others look for it; collective.

    Raises:
        UserError: this rank does not see it.
    """
    if world_size == 1:
        return
    store = distributed_c10d._get_default_store()
    if rank == 0:
        token = uuid.uuid4().hex
        folder.note(start=token)
        store.set(_KEY, token)
        return
    token = store.get(_KEY).decode()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while folder.notes().get("start") != token:
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder.path} on host {socket.gethostname()} (rank {rank}) is not the folder that rank 0 writes to; "
                f"give a train.output_dir on a file system that all hosts share"
            )
        time.sleep(_LOOK_SECONDS)
