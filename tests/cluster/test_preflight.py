"""The preflight: what hosts say of themselves, compared; the probe's own answers; and what it refuses to begin with."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from skvr_dist.cluster.preflight.checks import as_rows, examine
from skvr_dist.cluster.preflight.probe import MARK
from skvr_dist.cluster.preflight.remote import Remotes, Unreachable

ROOT = Path(__file__).parents[2]
HOSTS = ["a", "b", "c"]
Answers = dict[str, list[Any]]


def facts(number: int) -> dict[str, Any]:
    return {
        "host": HOSTS[number],
        "identity": HOSTS[number],
        "time": time.time(),
        "software": {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8"},
        "code": "c0de",
        "config": "c0f1",
        "devices": "2 x H100 80 GiB",
        "memory": 2**40,
        "memory_free": 2**39,
        "addresses": {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": [f"10.0.0.{number}"]},
        "resolved": {name: f"10.0.0.{other}" for other, name in enumerate(HOSTS)},
        "towards": dict.fromkeys(HOSTS, f"10.0.0.{number}"),
    }


class SaidBefore:
    """Stands in for `Remotes`: every host has its answer ready."""

    def __init__(self, answers: Answers) -> None:
        self.answers, self.all = answers, [self]
        self.asked: list[str] = []

    def ask_all(self, do: str, seconds: float, each: Sequence[Mapping[str, Any]] = (), **options: Any) -> list[Any]:
        self.asked.append(do)
        return self.answers[do]

    def ask(self, do: str, seconds: float, **options: Any) -> dict[str, Any]:
        return self.answers[do][0]


def whole() -> Answers:
    pairs = [{"wrong": [], "pairs": [[1, 1e-4, 9e8], [2, 1e-4, 9e8]]}, {"wrong": [], "pairs": [[2, 1e-4, 9e8]]}]
    return {
        "facts": [facts(number) for number in range(3)],
        "write": [{"made": ["/runs/mine"]}, {"made": []}, {"made": []}],
        "read": [{"missing": []}] * 3,
        "remove": [{}] * 3,
        "bind": [{}],
        "talk": [*pairs, {"wrong": [], "pairs": []}],
    }


def found_with(spoil: Callable[[Answers], None]) -> tuple[list[str], list[str], list[str]]:
    answers = copy.deepcopy(whole())
    spoil(answers)
    remotes = SaidBefore(answers)
    found = examine(cast(Remotes, remotes), HOSTS, ["run.yaml", "--"], "/runs/mine", 29500, 2)
    assert [row["verdict"] for row in as_rows(found)] == [
        "no" if any(text.startswith(f"{host}:") for text in found.problems) else "ok" for host in HOSTS
    ]
    return found.problems, found.notes, remotes.asked


def test_hosts_that_can_run_together() -> None:
    problems, notes, asked = found_with(lambda answers: None)
    assert problems == [] and asked == ["facts", "write", "read", "remove", "talk"]
    assert all("docker's bridge" in note for note in notes)


def set_in(answers: Answers, number: int, value: Any, *keys: str) -> None:
    place = answers["facts"][number]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: set_in(a, 1, "2.12.0", "software", "torch"), "b: has torch 2.12.0, but a has 2.13.0; install the"),
        (lambda a: set_in(a, 2, "beef", "code"), "c: its skvr_dist's code (beef) is not that of a (c0de); check the"),
        (lambda a: set_in(a, 2, "beef", "config"), "c: its configuration (beef) is not that of a (c0f1); let both"),
        (lambda a: set_in(a, 2, "b", "identity"), "c: is the same host as b; remove one of the two names"),
        (lambda a: set_in(a, 1, "1 x H100 80 GiB", "devices"), "b: has 1 GPUs, but 2 ranks are to run there"),
        (lambda a: set_in(a, 1, "", "resolved", "a"), "b: does not know a, where the ranks are to meet"),
        (lambda a: set_in(a, 1, "127.0.1.1", "resolved", "a"), "b: takes a for 127.0.1.1, which is no address that"),
        (lambda a: set_in(a, 1, "10.9.9.9", "resolved", "a"), "b: takes a for 10.9.9.9, which is no address that"),
        (lambda a: set_in(a, 1, "172.17.0.1", "towards", "a"), "b: would use docker0 (172.17.0.1), which no other"),
        (lambda a: a.update(facts=[*a["facts"][:2], Unreachable("it is off")]), "c: it is off"),
        (lambda a: a.update(facts=[*a["facts"][:2], {"error": "no such preset"}]), "c: no such preset"),
        (lambda a: a.update(write=[{"made": []}, {"error": "read-only"}, {"made": []}]), "b: cannot write /runs/mine"),
        (
            lambda a: a.update(read=[{"missing": ["x"]}, {"missing": []}, {"missing": ["y"]}]),
            "c: /runs/mine is not the same folder as on a; give a train.output_dir on a file system that all",
        ),
        (lambda a: a.update(bind=[{"error": "in use"}]), "a: port 29500, where the ranks are to meet, is in use"),
        (lambda a: a["talk"].__setitem__(1, {"error": "no way"}), "b: cannot talk to the others by eth0 10.0.0.1 and"),
        (
            lambda a: a["talk"].__setitem__(1, {"wrong": ["what host 2 sent"], "pairs": []}),
            "b: what host 2 sent is not what was sent",
        ),
    ],
)
def test_a_problem_names_the_host(spoil: Callable[[Answers], None], message: str) -> None:
    problems, _, asked = found_with(spoil)
    assert len(problems) == 1 and problems[0].startswith(message), problems
    if "write" in asked:
        assert "remove" in asked


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a: set_in(a, 1, time.time() + 60, "time"), "b: its clock is +60 s from this host's"),
        (lambda a: set_in(a, 1, time.time() - 60, "time"), "b: its clock is -60 s from this host's"),
        (
            lambda a: set_in(a, 1, "127.0.1.1", "resolved", "b"),
            "b: its own name is 127.0.1.1 to it (/etc/hosts); ranks",
        ),
        (lambda a: set_in(a, 2, "4 x H100 80 GiB", "devices"), "c: has 4 x H100 80 GiB, but a has 2 x H100 80 GiB"),
        (lambda a: a["talk"][1].update(pairs=[[2, 1e-4, 1e8]]), "b and c: 100 MB/s between them, where the median"),
    ],
)
def test_what_is_odd_is_noted(spoil: Callable[[Answers], None], message: str) -> None:
    problems, notes, _ = found_with(spoil)
    assert problems == [] and any(note.startswith(message) for note in notes), notes


def test_a_probe_answers_and_ends_with_the_one_who_asks(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "skvr_dist.cluster.preflight.probe"]
    probe = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert probe.stdin is not None and probe.stdout is not None
    answers = probe.stdout

    def ask(do: str, **options: Any) -> dict[str, Any]:
        print(json.dumps({"do": do, **options}), file=probe.stdin, flush=True)
        return json.loads(answers.readline().removeprefix(MARK))

    folder = tmp_path / "runs" / "mine"
    made = ask("write", folder=str(folder), name="token")["made"]
    assert made == [str(folder), str(folder.parent)]
    assert ask("read", folder=str(folder), names=["token"], patience=1) == {"missing": []}
    assert ask("read", folder=str(folder), names=["other"], patience=0.1) == {"missing": ["other"]}
    assert ask("remove", folder=str(folder), names=["token"], made=made) == {} and not folder.parent.exists()
    with socket.create_server(("", 0)) as taken:
        assert "in use" in ask("bind", port=taken.getsockname()[1])["error"]
    probe.stdin.close()
    assert probe.wait(30) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no --hostfile is given, and this is no allocation of Slurm"),
        (["--hostfile", "absent"], "absent: No such file"),
        (["--hostfile", "{hostfile}", "train.steps=1"], "train.steps=1 overrides a key, but no --config is given"),
        (["--hostfile", "{hostfile}", "--from", "model"], "--from model is given, but no --config; give the run's"),
        (["--hostfile", "{hostfile}", "--settle", "/dev/null/x"], "/dev/null"),
        (
            ["--hostfile", "a", "--hostfile", "b"],
            "--hostfile is a and b; give one, to a script of launch/ as HOSTFILE=b",
        ),
    ],
)
def test_what_the_preflight_refuses_to_begin_with(tmp_path: Path, words: list[str], message: str) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=1\n")
    words = [word.format(hostfile=hostfile) for word in words]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [sys.executable, "tools/preflight.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
