"""Some of the cases of `tools/verify.py hosts`, on real hosts made of namespaces, where these are allowed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skvr_dist.commands.verify import hosts
from skvr_dist.commands.verify.hosts import all_cases
from skvr_dist.lab.hosts import namespaces
from skvr_dist.lab.hosts.case import Case, Ending, Lab, play
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


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[str] = []
    endings: dict[str, Callable[[], Ending]] = {name: lambda: Ending("well") for name in "abc"}

    def case(name: str) -> Case:
        def note_and_end(_: Lab) -> Ending:
            played.append(name)
            return endings[name]()

        return Case(name, "fault", name, note_and_end)

    def call(*words: str) -> tuple[int, list[str]]:
        """The exit code, and the cases in the file that ended well."""
        parser = argparse.ArgumentParser()
        hosts.add_arguments(parser)
        options = parser.parse_args(["--json", str(file), *words])
        options.json = file
        try:
            code = hosts.run(options)
        except KeyboardInterrupt:
            code = 130
        return code, [record["case"] for record in json.loads(file.read_text()) if record["passed"]]

    def interrupt() -> Ending:
        raise KeyboardInterrupt

    file = tmp_path / "hosts.json"
    monkeypatch.setattr(hosts, "all_cases", lambda: [case(name) for name in "abc"])
    monkeypatch.setattr(namespaces, "why_not", lambda *programs: None)
    endings["b"] = lambda: Ending("badly", ["a miss"])
    assert call() == (1, ["a", "c"])
    endings["b"] = interrupt
    assert call("--resume") == (130, ["a", "c"])
    endings["b"] = lambda: Ending("well")
    assert call("--resume", "--only", "b") == (0, ["a", "b", "c"]) and played == [*"abc", "b", "b"]


def test_where_no_hosts_can_be_made_it_is_said(tmp_path: Path) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    command = [sys.executable, "tools/verify.py", "hosts", "--only", "^deepspeed$"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "skvr-verify hosts cannot run here: " in done.stderr
