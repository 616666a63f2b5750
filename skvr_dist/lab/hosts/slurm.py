"""A Slurm cluster of the lab's hosts: the controller on the first, a daemon on each; srun, sbatch and requeueing work.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge. Without cgroups: a step's processes are found by
their parents.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from skvr_dist.lab.hosts.hosts import Hosts

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged")
_SECONDS_TO_START = 20.0
_SETTINGS = """\
ClusterName=lab
SlurmctldHost=host1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout=20
InactiveLimit=0
MinJobAge=600
JobRequeue=1
SchedulerParameters=requeue_setup_env_fail
NodeName={names} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def start_slurm(hosts: Hosts, cpus: int = 4) -> None:
    """Start Slurm on all hosts, and wait until they are idle.

    Args:
        cpus: of a host, in Slurm's eyes, whatever this machine has.

    Raises:
        RuntimeError: something of it did not start.
    """
    folder = hosts.folder / "slurm"
    (folder / "state").mkdir(parents=True)
    names = f"host[1-{hosts.number}]"
    (folder / "slurm.conf").write_text(_SETTINGS.format(folder=folder, names=names, cpus=cpus))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for host in hosts.all:
        start_slurm_of(hosts, host)
    deadline = time.monotonic() + _SECONDS_TO_START
    while (shown := hosts.run(1, ["sinfo", "-h", "-o", "%T %D"]).stdout.strip()) != f"idle {hosts.number}":
        if time.monotonic() > deadline:
            raise RuntimeError(f"Slurm's hosts are {shown}: {(folder / 'slurmctld.log').read_text()[-2000:]}")
        time.sleep(0.1)


def start_slurm_of(hosts: Hosts, host: int) -> None:
    """Start what one host has of Slurm; also again, after it was powered off."""
    folder: Path = hosts.folder / "slurm"
    own = hosts.folder / f"host{host}" / "munge"
    own.mkdir(exist_ok=True)
    (folder / f"spool-host{host}").mkdir(exist_ok=True)
    hosts.do(
        host,
        f"mkdir -p /etc/slurm; chmod 755 /run/munge; mount --bind {folder} /etc/slurm\n"
        f"munged --force --key-file={folder}/munge.key --socket=/run/munge/munge.socket.2 "
        f"--pid-file=/run/munge/munged.pid --log-file={own}/munged.log --seed-file={own}/seed\n"
        + ("slurmctld\n" if host == 1 else "")
        + f"slurmd -N host{host}",
    )
