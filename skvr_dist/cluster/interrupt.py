"""Ending a run on request, with a checkpoint: the job is preempted, or its time is up.

A signal may reach one rank or all of them, at any moment. It only sets a flag; the flags of all ranks are summed at the
end of every step, so that all stop after the same one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

# SIGTERM is what launchers and batch systems send first; a terminal sends SIGINT for Ctrl-C and SIGHUP as it goes;
# Slurm sends SIGUSR1 ahead of the end where it is asked to.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# What the end of the console stands for, which is how a rank hears that its launcher has died. Python lets the write
# fail in place of the signal.
_NOTED = (*SIGNALS, signal.SIGPIPE)


def on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Have `SIGNALS` handled from now on; SIGHUP not under nohup, where a terminal may be closed."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class InterruptListener:
    """Notes the signals that ask a run to end, from its construction to the end of the process.

    A second signal changes nothing: launchers pass on what the ranks may have received already.
    """

    def __init__(self) -> None:
        self._received: set[int] = set()
        on_signals(self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._received.add(number)

    def note_lost_console(self) -> None:
        """Nobody reads any longer what this rank prints: end the run as after a signal."""
        self._received.add(signal.SIGPIPE)

    def flags(self) -> list[float]:
        """For each of `SIGNALS`, then for the end of the console: 1 if this rank has met it, else 0."""
        return [float(number in self._received) for number in _NOTED]

    @staticmethod
    def in_words(ranks: list[float]) -> str | None:
        """The signals that any rank has received, from the sum of all ranks' flags; None if there are none."""
        return " and ".join(number.name for number, count in zip(_NOTED, ranks, strict=True) if count) or None
