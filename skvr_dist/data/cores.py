"""How many processes a machine takes."""

from __future__ import annotations

import os

from skvr_dist.errors import UserError


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_few_processes(name: str, number: int) -> None:
    """Refuse processes in such a number that starting them would take the machine down.

    Args:
        name: of the option or key that asks for them.

    Raises:
        UserError: they are more than eight per core, and more than 64.
    """
    cores = available_cores()
    if number > (most := max(64, 8 * cores)):
        raise UserError(f"{name} {number} are too many processes for {cores} cores; at most {most}")
