"""Opening a checkpoint on all ranks of a run, without each of a thousand asking the file system for the same files."""

from __future__ import annotations

from pathlib import Path

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.errors import UserError
from skvr_dist.host_group import HostGroup


def open_together(path: str | Path, group: HostGroup, *, looks: bool) -> Checkpoint:
    """Open a checkpoint on all ranks; collective over `group`.

    Args:
        path: as `Checkpoint` takes it, the same on all ranks.
        looks: whether this rank looks at the files, as rank 0 and one rank of each host do. The others are told what
            rank 0 has read.

    Raises:
        UserError: on all ranks: there is none for one that looks, or another one than rank 0's.
    """
    checkpoint, problem = None, None
    if looks:
        try:
            checkpoint = Checkpoint(path)
        except UserError as error:
            problem = str(error)
    if problem := group.first_problem(problem):
        raise UserError(problem)
    description = group.from_first(checkpoint.description if checkpoint and group.rank == 0 else None)
    if checkpoint and checkpoint.description != description:
        problem = (
            f"{checkpoint.folder} holds another checkpoint on the host of rank {group.rank} than on that of rank 0; do "
            f"all hosts see the same folder?"
        )
    if problem := group.first_problem(problem):
        raise UserError(problem)
    return checkpoint or Checkpoint(path, description=description)
