"""The one exception that a user is meant to read, and the wrapper that prints it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something a user can put right: the message names the culprit, both values and the way out."""

    exit_code = 2


class OneRankError(UserError):
    """What this rank alone has met, so that no other one says it."""


class RunInterrupted(UserError):
    """A run that cannot go on here but can be started again as it is: a rank died, or the job was preempted."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


EXIT_MISSED = 1
"""Exit code of a checking command whose figure was missed."""
EXIT_USAGE = UserError.exit_code
"""Exit code of every command that refuses its input."""
EXIT_AGAIN = RunInterrupted.exit_code
"""Exit code of a run that a launcher or a batch system may simply start again."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line: a `UserError` becomes one sentence on stderr and its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file need not be text, a terminal not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except UserError as error:
        if isinstance(error, OneRankError) or not _said_by_another_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(code or 0)


def _said_by_another_rank() -> bool:
    """Whether another rank of this host says it: all meet the same mistake until they join their process group."""
    variables = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_ranks = [os.environ[name] for name in variables if name in os.environ]
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    return bool(local_ranks) and local_ranks[0] != "0" and not joined
