"""Ending a run on request, with a checkpoint: the job is preempted, or its time is up.

A signal may reach one rank or all of them, at any moment. It only sets a flag; after every step all ranks agree, so
that they stop after the same one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

# SIGTERM is what launchers and batch systems send first; a terminal sends SIGINT for Ctrl-C; Slurm sends SIGUSR1 ahead
# of the end where it is asked to.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class InterruptListener:
    """Notes the signals that ask a run to end, from its construction to the end of the process.

    A second signal changes nothing: launchers pass on what the ranks may have received already.

    Args:
        sum_over_ranks: the element-wise sum over all ranks of a list of equal length on each; collective.
    """

    def __init__(self, sum_over_ranks: Callable[[list[float]], list[float]]) -> None:
        self._sum_over_ranks = sum_over_ranks
        self._received: set[int] = set()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.add(number)

    def received(self) -> str | None:
        """The signals that any rank has received, in words; collective over all ranks."""
        ranks = self._sum_over_ranks([float(number in self._received) for number in SIGNALS])
        return " and ".join(number.name for number, count in zip(SIGNALS, ranks, strict=True) if count) or None
