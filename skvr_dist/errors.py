"""The one exception that a user is meant to read, and the wrapper that prints it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something a user can put right: the message names the culprit, both values and the way out."""


EXIT_MISSED = 1
"""Exit code of a checking command whose figure was missed."""
EXIT_USAGE = 2
"""Exit code of every command that refuses its input."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command line: a `UserError` becomes one sentence on stderr and exit code 2."""
    try:
        code = main()
    except UserError as error:
        if not _said_by_another_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USAGE)
    sys.exit(code or 0)


def _said_by_another_rank() -> bool:
    """Whether another rank of this host says it: all meet the same mistake until they join their process group."""
    variables = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_ranks = [os.environ[name] for name in variables if name in os.environ]
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    return bool(local_ranks) and local_ranks[0] != "0" and not joined
