"""Some of the cases of `tools/verify.py hosts`, on real hosts made of namespaces, where these are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skvr_dist.commands.verify.hosts import all_cases
from skvr_dist.lab.hosts.case import Case, Lab, play
from skvr_dist.lab.hosts.namespaces import why_not

ROOT = Path(__file__).parents[2]
QUICK = [case for case in all_cases() if case.quick]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.hosts
@pytest.mark.parametrize("case", QUICK, ids=[case.name for case in QUICK])
def test_a_case_ends_as_it_must(lab: Lab, case: Case) -> None:
    if reason := why_not(*case.programs):
        pytest.skip(reason)
    assert play(case, lab).ending.misses == []


def test_names_of_cases_are_theirs_alone() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_where_no_hosts_can_be_made_it_is_said(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    command = [sys.executable, "tools/verify.py", "hosts", "--only", "^deepspeed$"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "skvr-verify hosts cannot run here: " in done.stderr
