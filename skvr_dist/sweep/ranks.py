"""The ranks of one run on this host, started without a launcher.

Launchers return 1 whatever a rank ended with (docs/exit-codes.md), take seconds of a core to start, and deepspeed's
dies of a signal and leaves its ranks. A sweep must tell 2 from 75, and starts many short runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from skvr_dist.cluster.launcher import free_port, is_of_a_launcher
from skvr_dist.cluster.processes import SECONDS_TO_END
from skvr_dist.errors import EXIT_AGAIN, EXIT_USAGE
from skvr_dist.files import append_line, naming_failure
from skvr_dist.run.folder import RunFolder

SECONDS_TO_SPEAK = 3.0
"""After the end of one rank, in which the others may say what they have met, before they are told to end."""


class Ranks:
    """The processes of a run; what they print is added to its console.txt.

    Args:
        folder: of the run; its config.yaml is what is run.
        ranks: how many.
        variables: of the environment, over this process's own.

    Raises:
        UserError: the console cannot be written.
    """

    def __init__(self, folder: RunFolder, ranks: int, variables: Mapping[str, str]) -> None:
        own = {key: value for key, value in os.environ.items() if not is_of_a_launcher(key)}
        port, command = str(free_port()), pretrain_command(folder.config)
        with naming_failure(folder.console), folder.console.open("ab") as console:
            self._processes = [
                subprocess.Popen(
                    command,
                    env={**own, **variables, **_announced(rank, ranks, port)},
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C comes to the sweep alone, which passes it on
                )
                for rank in range(ranks)
            ]
        self._console = folder.console
        self._failed_at: float | None = None
        self._is_told = self._has_ended = False

    def poll(self) -> int | None:
        """The exit code of the run, None while a rank lives; once one has failed the others are ended."""
        codes = [process.poll() for process in self._processes]
        known = [code for code in codes if code is not None]
        if len(known) == len(codes):
            if not self._has_ended:
                self._has_ended = True
                self._tell_of_killed(known)
            return _code_of_all(known)
        if any(known):
            self._failed_at = self._failed_at or time.monotonic()
            waited = time.monotonic() - self._failed_at
            if waited > SECONDS_TO_SPEAK + SECONDS_TO_END:
                for process in self._processes:
                    process.kill()
            elif waited > SECONDS_TO_SPEAK and not self._is_told:
                self.stop()
        return None

    def _tell_of_killed(self, codes: Sequence[int]) -> None:
        """Add a sentence to the console for a rank that could not say why it ended."""
        for rank, code in enumerate(codes):
            if code < 0 and code != -signal.SIGTERM:  # which is ours
                name = signal.Signals(-code).name
                append_line(self._console, f"error: rank {rank} was ended by {name}; of SIGKILL look for memory first")

    def stop(self) -> None:
        """Ask the ranks to save and end."""
        self._is_told = True
        for process in self._processes:
            process.terminate()


def pretrain_command(config: Path) -> list[str]:
    """The command line of one rank."""
    return [sys.executable, "-m", "skvr_dist.commands.pretrain", "--config", str(config)]


def _announced(rank: int, ranks: int, port: str) -> dict[str, str]:
    """What launchers tell a rank; nothing to one that is alone."""
    if ranks == 1:
        return {}
    number, size = str(rank), str(ranks)
    of_rank = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {**of_rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _code_of_all(codes: Sequence[int]) -> int:
    """The exit code of a run: what the user must put in order comes first, then what nobody foresaw, then 75.

    A rank that a signal has killed is one that died: the run can be started again.
    """
    own = [code for code in codes if code > 0 and code != EXIT_AGAIN]
    if EXIT_USAGE in own:
        return EXIT_USAGE
    return own[0] if own else EXIT_AGAIN if any(codes) else 0
