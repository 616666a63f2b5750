"""The sweep with runs that are played: what is started, started again, given up and ended; and the ranks of a run."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skvr_dist.cluster.interrupt import SIGNALS
from skvr_dist.cluster.processes import marked_processes
from skvr_dist.config.load import load_config
from skvr_dist.config.presets import find_config
from skvr_dist.errors import UserError
from skvr_dist.run.folder import RunFolder
from skvr_dist.sweep import ranks, slurm
from skvr_dist.sweep.board import Board
from skvr_dist.sweep.experiment import Place
from skvr_dist.sweep.loop import Status, Sweep
from skvr_dist.sweep.places import MARK, ThisMachine
from skvr_dist.sweep.plan import PlannedRun
from skvr_dist.sweep.ranks import Ranks
from skvr_dist.sweep.results import Results
from skvr_dist.sweep.slurm import Slurm

STEPS = 9


@dataclass
class PlayedJob:
    """Ends at the second look with a code, or when it is asked to."""

    code: int | None
    looks: int = 0
    stopped: int = 0

    def poll(self) -> int | None:
        self.looks += 1
        if self.stopped:
            return 75
        return self.code if self.looks > 1 else None

    def stop(self) -> None:
        self.stopped += 1


Endings = dict[str, list[tuple[int, int | None]]]


@dataclass
class PlayedMachine:
    """Each start of a run takes the next of its endings: the step that is saved, and the exit code."""

    endings: Endings
    at_once: int = 2
    started: list[str] = field(default_factory=list)
    jobs: list[PlayedJob] = field(default_factory=list)

    def start(self, run: PlannedRun) -> PlayedJob:
        assert sum(job.code is not None and job.looks < 2 for job in self.jobs) < self.at_once
        saved, code = self.endings[run.name].pop(0)
        if saved:
            (run.folder.checkpoints / f"step-{saved:08d}").mkdir(parents=True, exist_ok=True)
        self.started.append(run.name)
        self.jobs.append(PlayedJob(code))
        return self.jobs[-1]


def planned(folder: Path, name: str, trunk: PlannedRun | None = None, step: int = 0, seed: int = 0) -> PlannedRun:
    overrides = [f"train.steps={STEPS}", "train.warmup_steps=0", f"train.output_dir={folder / name}"]
    overrides.append(f"train.seed={seed}")
    (folder / name).mkdir()
    config = load_config([find_config("quickstart")], overrides)
    if trunk is None:
        return PlannedRun(name, (), config)
    return PlannedRun(name, (), config, trunk.folder.checkpoints / f"step-{step:08d}", trunk.name)


def sweep(
    folder: Path,
    machine: PlayedMachine,
    runs: Sequence[PlannedRun],
    show: Callable[[Sequence[Status]], None] = lambda _: None,
) -> tuple[str | None, list[Status]]:
    results = Results(folder / "results.jsonl")
    made = Sweep(runs, machine, results, retries=1, commit="abc", show=show)
    return made.run(), made.statuses


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skvr_dist.sweep.loop._LOOK_SECONDS", 0.001)


@pytest.fixture(autouse=True)
def handlers() -> object:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    runs = [planned(tmp_path, name) for name in ("bad", "again", "done", "good")]
    (runs[2].folder.checkpoints / f"step-{STEPS:08d}").mkdir(parents=True)
    runs[0].folder.console.write_text("error: old\nnoise\nerror: no such data\n")
    # 75 twice without a checkpoint between would be given up; with one it is not.
    endings: Endings = {"bad": [(3, 2)], "again": [(0, 75), (4, 75), (4, 75), (STEPS, 0)], "good": [(STEPS, 0)]}
    ended_by, statuses = sweep(tmp_path, machine := PlayedMachine(endings), runs)
    assert ended_by is None
    assert [status.state for status in statuses] == ["failed", "finished", "finished", "finished"]
    assert machine.started.count("again") == 4 and "done" not in machine.started
    assert statuses[0].error.startswith("exit code 2: no such data (all of it is in ")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["bad", "again", "done", "good"]
    assert lines[0]["state"] == "failed" and lines[0]["error"] == statuses[0].error and not lines[1]["error"]
    assert runs[3].folder.notes()["commits"] == ["abc"]


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, board = planned(tmp_path, "a"), Board()
    board.show([Status(run, "waiting", 0)])
    board.show([Status(run, "running", 0)])
    board.show([Status(run, "running", 0)])
    run.folder.metrics.write_text(
        '{"step": 2, "train/loss": 3.0}\n{"step": 2, "evaluate/loss/full": 2.5}\n{"step": 3, "tr'
    )
    board.show([Status(run, "failed", 0, "exit code 2: no")])
    board.close([Status(run, "failed", 0)])
    assert capsys.readouterr().out.splitlines() == [
        "a: running",
        "a: failed, exit code 2: no",
        "| run   | state   | step   | loss   | held-out loss   |",
        "|-------|---------|--------|--------|-----------------|",
        "| a     | failed  | 2/9    | 3.0000 | full 2.5000     |",
    ]
    run.folder.metrics.write_text('{"step": 3, "train/loss": null, "evaluate/loss/full": null}\n')
    board.close([Status(run, "failed", 0)])
    assert "| a     | failed  | 3/9    | nan    | full nan        |" in capsys.readouterr().out


def test_75_without_progress_is_given_up(tmp_path: Path) -> None:
    runs = [planned(tmp_path, "a")]
    _, statuses = sweep(tmp_path, machine := PlayedMachine({"a": [(0, 75)] * 9}), runs)
    assert statuses[0].state == "failed" and len(machine.started) == 2


def test_a_branch_begins_when_its_checkpoint_is_there(tmp_path: Path) -> None:
    trunk = planned(tmp_path, "trunk")
    steps = {"early": 4, "late": STEPS, "lost": 5}
    runs = [trunk, *(planned(tmp_path, name, trunk, step) for name, step in steps.items())]
    endings: Endings = {"trunk": [(4, 75), (STEPS, 0)], "early": [(STEPS, 0)], "late": [(STEPS, 0)]}
    _, statuses = sweep(tmp_path, machine := PlayedMachine(endings), runs)
    assert [status.state for status in statuses] == ["finished", "finished", "finished", "failed"]
    assert machine.started[0] == "trunk" and machine.started[-1] == "late"
    assert statuses[3].error.startswith("trunk, which it branches off, is finished without ")


def test_a_signal_ends_all_and_starts_none(tmp_path: Path) -> None:
    runs = [planned(tmp_path, name) for name in ("a", "b", "c")]
    machine = PlayedMachine({name: [(0, None)] for name in ("a", "b", "c")})

    def interrupt(statuses: Sequence[Status]) -> None:
        if any(status.state == "running" for status in statuses):
            os.kill(os.getpid(), signal.SIGINT)

    ended_by, statuses = sweep(tmp_path, machine, runs, interrupt)
    assert ended_by == "SIGINT" and machine.started == ["a", "b"]
    assert [job.stopped for job in machine.jobs] == [1, 1]
    assert {status.state for status in statuses} == {"waiting"}


# A rank that is played by a script: it ends as its line of the script says.
RANK = """
import os, sys, time
rank = int(os.environ.get("RANK", 0))
print("rank", rank, "of", os.environ.get("WORLD_SIZE"), flush=True)
action = sys.argv[2 + rank]
if action == "stays":
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("up", flush=True)
    time.sleep(60)
os.kill(os.getpid(), 9) if action == "killed" else sys.exit(int(action))
"""


@pytest.mark.parametrize(
    ("actions", "code"),
    [
        (["0", "0"], 0),
        (["75", "2"], 2),
        (["75", "70"], 70),
        (["killed", "75"], 75),
        (["killed"], 75),
        (["1", "stays"], 1),
    ],
)
def test_the_code_of_a_run_is_that_of_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actions: list[str], code: int
) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.setattr(ranks, "pretrain_command", lambda _: [sys.executable, str(tmp_path / "rank.py"), "", *actions])
    monkeypatch.setenv("WORLD_SIZE", "5")  # left over
    if "stays" in actions:
        monkeypatch.setattr(ranks, "SECONDS_TO_SPEAK", 0.5)
        monkeypatch.setattr(ranks, "SECONDS_TO_END", 2.0)
    started = Ranks(RunFolder(tmp_path), len(actions), {})
    deadline = time.monotonic() + 60
    while (found := started.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert found == code
    console = (tmp_path / "console.txt").read_text()
    assert ("error: rank 0 was ended by SIGKILL" in console) == (actions[0] == "killed")
    assert f" of {len(actions) if len(actions) > 1 else None}\n" in console


def test_what_a_killed_sweep_has_left_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.setattr(ranks, "pretrain_command", lambda _: [sys.executable, str(tmp_path / "rank.py"), "", "stays"])
    left = ThisMachine(Place(at_once=1), tmp_path).start(planned(tmp_path, "a"))
    while not marked_processes(MARK, str(tmp_path)) or "up" not in (tmp_path / "a/console.txt").read_text():
        time.sleep(0.02)
    ThisMachine(Place(), tmp_path)
    assert left.poll() is not None and not marked_processes(MARK, str(tmp_path))


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        (Place(), ["4", "6"]),
        (Place(at_once=5), ["4", "6", "4", "6", "4"]),
        (Place(ranks=2, at_once=3), ["4,6", "4,6", "4,6"]),
    ],
    ids=["own", "shared", "shared-by-ranks"],
)
def test_runs_share_gpus_when_there_are_more_runs(
    place: Place, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    machine = ThisMachine(place, tmp_path)
    assert [machine.variables(number)["CUDA_VISIBLE_DEVICES"] for number in range(machine.at_once)] == shown
    with pytest.raises(UserError, match=r"place\.ranks 3 needs 3 GPUs, but there are 2; lower it"):
        ThisMachine(Place(ranks=3), tmp_path)


def test_slurm_without_submitit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"submitit is missing; install skvr-dist\[slurm\], or give --place"):
        Slurm(Place(kind="slurm"), tmp_path)


class Submitted(SimpleNamespace):
    """A job of submitit's, whose accounts say nothing of it."""

    def __init__(self, folder: Path, job_id: str = "7") -> None:
        super().__init__(job_id=job_id, paths=SimpleNamespace(result_pickle=folder / f"{job_id}_0_result.pkl"))

    def result(self) -> int:
        return int(self.paths.result_pickle.read_text())


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what `squeue` does, in the words of a shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("_ASK_SECONDS", "_LOOK_SECONDS"):
        monkeypatch.setattr(slurm, name, -1.0)

    def does(script: str) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "squeue").chmod(0o755)

    return does


def test_a_job_that_slurm_ended_is_over_without_a_result(
    tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = slurm.SlurmJob(Submitted(tmp_path), slurm.Queue(), since=0.0)
    for script in ("echo 7 PENDING", "echo 7 COMPLETING", "echo no answer >&2; exit 1"):
        squeue(script)
        assert not job.is_over() and job.poll() is None
    for script in ("echo 7 CANCELLED", "echo 70 RUNNING", "true"):
        squeue(script)
        assert job.is_over() and job.poll() is None  # a node's file may yet be seen
    monkeypatch.setattr(slurm, "_SECONDS_TO_SEE", 0.0)
    assert job.poll() == 75
    (tmp_path / "7_0_result.pkl").write_text("2")
    squeue("echo 7 COMPLETING")
    assert job.poll() == 2


def test_slurm_leaves_starting_again_to_the_sweep(
    tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def submit(*_: object) -> Submitted:
        if given["slurm_partition"] == "none":
            raise RuntimeError("sbatch: error: Invalid partition name specified")
        return Submitted(tmp_path, str(next(numbers)))

    numbers = itertools.count(1)
    executor = SimpleNamespace(update_parameters=lambda **parameters: given.update(parameters), submit=submit)
    fake = SimpleNamespace(AutoExecutor=lambda *_, **__: executor, SlurmJob=Submitted, LocalJob=Submitted)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    run, place = planned(tmp_path, "a"), Place(kind="slurm", slurm={"slurm_partition": "all"})
    squeue("echo 1 PENDING")
    for _ in range(2):  # the second sweep finds the job of the first
        Slurm(place, tmp_path).start(run)
        assert run.folder.notes()["slurm_job"] == "1"
    assert given["slurm_additional_parameters"] == {"no-requeue": True}
    squeue("true")
    Slurm(place, tmp_path).start(run)
    assert run.folder.notes()["slurm_job"] == "2"
    with pytest.raises(UserError, match=r"does not take the job of a .*Invalid partition.*correct place\.slurm"):
        Slurm(Place(kind="slurm", slurm={"slurm_partition": "none"}), tmp_path).start(run)


def test_results_of_other_seeds_stay(tmp_path: Path) -> None:
    def written(title: str, seed: int, keeps_other_seeds: bool = True) -> list[str]:
        run = planned(tmp_path, f"{title}_seed-{seed}", seed=seed)
        Results(tmp_path / "results.jsonl", keeps_other_seeds=keeps_other_seeds).write([run], {})
        return [json.loads(line)["name"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    assert written("a", 0) == ["a_seed-0"]
    assert written("a", 1) == ["a_seed-1", "a_seed-0"]
    shutil.rmtree(tmp_path / "a_seed-0")
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": 1}\n{"na')
    assert written("a", 2) == ["a_seed-2", "a_seed-1"]
    assert written("a", 3, keeps_other_seeds=False) == ["a_seed-3"]  # 1 and 2 are no seeds of the file any more
    assert written("b", 2) == ["b_seed-2"]  # a is no run of it
