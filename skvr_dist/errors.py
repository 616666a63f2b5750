"""Exceptions whose messages are written for users, and the exit codes that go with them.

`skvr_dist.command` prints them. This file travels inside exports, so it imports nothing.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something a user can correct: the message names the culprit, both values and the way out."""

    exit_code = 2


class OneRankError(UserError):
    """An error that this rank alone has met, so that no other rank can print it."""


class RunInterrupted(UserError):
    """A run that cannot continue here but can be started again as it is: a rank died, or the job was preempted."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


EXIT_MISSED = 1
"""Exit code of a checking command whose figure was missed."""
EXIT_USAGE = UserError.exit_code
"""Exit code of every command that refuses its input."""
EXIT_AGAIN = RunInterrupted.exit_code
"""Exit code of a run that a launcher or a batch system may simply start again."""
