"""The tasks of a step of Slurm as ranks: what srun tells each of them, in the words of other launchers.

`srun` with a task per rank announces no place to meet. Ranks meet on the first host of the step, at a port that follows
from the numbers of job and step, so that two jobs on a host keep out of each other's way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from skvr_dist.errors import UserError

_PORTS = range(10_000, 32_768)  # as `skvr_dist.cluster.launcher.free_port`
_STEPS = 101  # of a job, more than most have; a prime, so that jobs' ports do not coincide in rows
# MPICH's of a local rank: Slurm's own plugin pmi2 (`MpiDefault`) sets PMI_RANK too.
_SETTLED = ("RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")


def tasks_as_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a launcher for a task that srun started beside others; none where another launcher did.

    In the shell of an allocation Slurm sets some of these variables too, but no number of tasks of the step.

    Raises:
        UserError: Slurm's variables make no sense.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or "SLURM_PROCID" not in environment or any(name in environment for name in _SETTLED):
        return {}
    try:
        hosts = expand(environment["SLURM_STEP_NODELIST"])
        per_host = tasks_per_host(environment["SLURM_STEP_TASKS_PER_NODE"])
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        ranks = {
            "RANK": str(int(environment["SLURM_PROCID"])),
            "WORLD_SIZE": str(int(tasks)),
            "LOCAL_RANK": str(int(environment["SLURM_LOCALID"])),
            "LOCAL_WORLD_SIZE": str(per_host[int(environment["SLURM_NODEID"])]),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"Slurm announces {tasks} tasks, but not what belongs to them ({type(error).__name__}: {error}); start "
            f"them with srun, or unset its variables if they are left over"
        ) from None
    meeting = {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(port_of(job, step))}
    return ranks | {name: environment.get(name, value) for name, value in meeting.items()}


def hosts_of_tasks(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The host of each task of the step, by its number; none outside of a step, or where they are dealt otherwise.

    Raises:
        ValueError: Slurm's variables make no sense.
    """
    names, counts = environment.get("SLURM_STEP_NODELIST"), environment.get("SLURM_STEP_TASKS_PER_NODE")
    dealt = environment.get("SLURM_DISTRIBUTION", "block").partition(":")[0]
    if names is None or counts is None or dealt not in ("block", "cyclic"):
        return []
    hosts = list(zip(expand(names), tasks_per_host(counts), strict=True))
    if dealt == "block":
        return [host for host, tasks in hosts for _ in range(tasks)]
    return [host for turn in range(max(tasks for _, tasks in hosts)) for host, tasks in hosts if turn < tasks]


def port_of(job: int, step: int) -> int:
    """Where the ranks of a step meet."""
    return _PORTS[(job * _STEPS + step) % len(_PORTS)]


def allocation(environment: Mapping[str, str] = os.environ) -> tuple[list[str], int, int] | None:
    """The hosts that Slurm gave to the job that this process belongs to; None outside of one.

    Returns:
        their names, the tasks of the host that has most, and a port that no step of the job meets at soon.

    Raises:
        UserError: Slurm's variables make no sense.
    """
    if "SLURM_JOB_NODELIST" not in environment:
        return None
    try:
        tasks = max(tasks_per_host(environment.get("SLURM_TASKS_PER_NODE", "1")))
        port = port_of(int(environment["SLURM_JOB_ID"]), _STEPS - 1)
        return expand(environment["SLURM_JOB_NODELIST"]), tasks, port
    except (KeyError, ValueError) as error:
        raise UserError(
            f"Slurm's variables are not those of an allocation ({type(error).__name__}: {error}); unset them if they "
            f"are left over"
        ) from None


def expand(names: str) -> list[str]:
    """The hosts of a list of Slurm's, such as `gpu[01-03,7]-a,login`.

    Raises:
        ValueError: it is no such list.
    """
    hosts: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", names):
        hosts += _expand_one(name)
    return hosts


def _expand_one(name: str) -> list[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, after = rest.partition("]")
    found = []
    for part in inside.split(","):
        first, _, last = part.partition("-")
        found += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{tail}" for number in found for tail in _expand_one(after)]


def tasks_per_host(counts: str) -> list[int]:
    """Tasks on each host of a step, in its order, from a text such as `2(x3),1`.

    Raises:
        ValueError: it is no such text.
    """
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks
