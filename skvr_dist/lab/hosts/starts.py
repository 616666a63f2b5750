"""Every way in which users start a run on several hosts; each is a row of the table of starts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from skvr_dist.lab.hosts.case import CPU, STEPS, Case, Ending, Lab, losses, write_hostfile
from skvr_dist.lab.hosts.hosts import Hosts


def judge(lab: Lab, hosts: Hosts, run: Path, done: subprocess.CompletedProcess[str], ranks: int = 2) -> Ending:
    """A start that must train: code 0, the losses of the same ranks on one machine, nothing left running."""
    ending = Ending("trains, same losses")
    ending.expect(done.returncode == 0, f"code {done.returncode}: {last_words(done)}")
    found, expected = losses(run), lab.reference(ranks)
    ending.expect(found == expected, f"losses {found}, on one machine {expected}")
    ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
    if ending.misses:
        ending.found = f"code {done.returncode}, {len(found)} of {STEPS} steps"
    return ending


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The lines of a console that say what went wrong."""
    lines = (done.stdout + "\n" + done.stderr).splitlines()
    telling = [line for line in lines if re.search(r"error|Error|refused|denied|cannot|timed out", line)]
    return " | ".join(line[:300] for line in (telling or lines)[-4:])


def deepspeed_pdsh(lab: Lab) -> Ending:
    """`deepspeed --hostfile`, which starts the hosts over pdsh and ssh."""
    run = lab.run_folder("deepspeed")
    with lab.hosts() as hosts:
        command = ["deepspeed", "--hostfile", str(write_hostfile(hosts)), "launch/pretrain.py", *lab.arguments(run)]
        (hosts.folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
        env = {**CPU, "DS_ENV_FILE": str(hosts.folder / ".deepspeed_env")}
        return judge(lab, hosts, run, hosts.run(1, command, env=env, seconds=120))


STARTS = [
    Case("deepspeed", "start", "`deepspeed --hostfile`: pdsh over ssh", deepspeed_pdsh, programs=["pdsh"]),
]
