"""The commands of docs/launch.md, run as they stand on two hosts that share a fresh clone."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from skvr_dist.lab.hosts.case import Case, Ending, Lab, losses
from skvr_dist.lab.hosts.hosts import ROOT, Hosts
from skvr_dist.lab.hosts.slurm import PROGRAMS, start_slurm
from skvr_dist.lab.hosts.starts import SECONDS, last_words
from skvr_dist.lab.small_run import make_data

PAGE = ROOT / "docs" / "launch.md"
_STEPS = 40
_EVERY_HOST = re.compile(r"# on every host|# on host number \$N")


def blocks(page: str) -> list[str]:
    """The blocks of commands on a page, in its order."""
    return re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)


def follow(lab: Lab) -> Ending:
    """Run every block, on the first host or on both; every run must train to its end with the same losses."""
    clone = lab.run_folder("clone")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "data").mkdir(exist_ok=True)
    make_data(clone / "data" / "stdlib", "encodings", 32)  # as `make data`, but less
    page = blocks(PAGE.read_text(encoding="utf-8"))
    variables = " ".join(line for block in page for line in block.splitlines() if line.startswith("export "))
    ending = Ending(f"{len(page)} blocks of commands, all runs with the same losses")
    # Where nothing is installed, Python finds the clone by its path.
    with lab.hosts(2, login={"PYTHONPATH": str(clone)}) as hosts:
        start_slurm(hosts)
        for block in page:
            for code, said in _run(hosts, clone, f"{variables}\n{block}", everywhere=bool(_EVERY_HOST.match(block))):
                ending.expect(code == 0, f"code {code} of «{block.strip()[:80]}»: {said}")
        ending.expect(not hosts.left_over(), f"left running: {hosts.left_over()}")
    named = sorted(set(re.findall(r"train\.output_dir=(runs/\S+) train\.steps", PAGE.read_text(encoding="utf-8"))))
    found = {name: losses(clone / name) for name in named}
    for name, each in found.items():
        ending.expect(len(each) == _STEPS, f"{name} has losses {each}")
        ending.expect(each == found[named[0]], f"{name} has losses {each}, {named[0]} {found[named[0]]}")
    return ending


def _run(hosts: Hosts, clone: Path, script: str, *, everywhere: bool) -> list[tuple[int, str]]:
    """Code and last words of a block on each host that it is for."""
    words = ["bash", "-ec", script]
    log = hosts.folder / "second.log"
    second = hosts.start(2, words, log=log, folder=clone, env={"N": "1"}) if everywhere else None
    done = hosts.run(1, words, folder=clone, env={"N": "0"}, seconds=2 * SECONDS)
    ended = [(done.returncode, last_words(done))]
    return [*ended, (second.wait(60), log.read_text()[-500:])] if second else ended


DOCS = [
    Case("docs", "start", "every command of docs/launch.md, word for word", follow, programs=["pdsh", *PROGRAMS]),
]
