"""Runs that end early: signals, launchers that die, restarts; and a real run that is killed until it is through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from skvr_dist.cluster import keep_running
from skvr_dist.cluster.interrupt import SIGNALS, InterruptListener
from skvr_dist.cluster.keep_running import KeptRun
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.cases import SHAPE
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.mesh import Mesh

ROOT = Path(__file__).parents[2]


def one_rank_is_told() -> list[str | None]:
    from skvr_dist.config.model import ModelConfig

    mesh = Mesh.build(ParallelConfig(), ModelConfig.model_validate(SHAPE))
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    listener = InterruptListener()

    def received() -> str | None:
        return listener.in_words(mesh.host_group.sum(listener.flags()))

    heard = [received()]
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    heard.append(received())
    if mesh.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    heard.append(received())
    if mesh.rank == 2:
        os.kill(os.getpid(), signal.SIGHUP)
        listener.note_lost_console()
    heard.append(received())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    InterruptListener()
    os.kill(os.getpid(), signal.SIGHUP)
    return [*heard, "ignored" if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else None]


def test_all_ranks_hear_of_a_signal_to_one() -> None:
    told = [None, "SIGUSR1", "SIGTERM and SIGUSR1", "SIGTERM and SIGUSR1 and SIGHUP and SIGPIPE", "ignored"]
    assert run_ranks(3, one_rank_is_told) == [told] * 3


# The attempts of a run, played by a script that saves as many steps as it is told and ends as it is told: what
# KeptRun sees of a run are its folder, its processes and its exit code.
ATTEMPT = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
script = json.loads((run / "script.json").read_text())
number = len(list(run.glob("attempt-*")))
(run / f"attempt-{number}").touch()
saved, ending = script[number]
(run / "config.yaml").write_text("train: {steps: 4}")
if saved:
    (run / f"checkpoints/step-{saved:08d}").mkdir(parents=True)
if ending == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if ending == "asked":
    (run / "run.json").write_text('{"interrupted": {"by": "SIGTERM", "time": 1.0}}')
    ending = 1
if ending == "asked itself":
    os.kill(os.getpid(), signal.SIGTERM)
if ending == "orphan" and os.fork() == 0:
    (run / "orphan").write_text(str(os.getpid()))
    time.sleep(60)
if ending == "orphan":
    while not (run / "orphan").exists():
        time.sleep(0.01)
    ending = 0
if ending == "launches":  # a launcher, deaf to signals, with one rank
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.environ["LOCAL_RANK"] = "0"
        rank = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
        os.execv(sys.executable, [sys.executable, "-c", rank + f"open(r'{run}/up', 'w').close(); time.sleep(60)"])
    ending = os.waitstatus_to_exitcode(os.wait()[1])
sys.exit(ending)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "attempt.py").write_text(ATTEMPT)
    return tmp_path


def command(run: Path, *attempts: tuple[int, Any]) -> list[str]:
    (run / "script.json").write_text(json.dumps(attempts))
    return [sys.executable, str(run / "attempt.py"), str(run)]


@pytest.fixture
def own_signals() -> Any:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("attempts", "restarts", "code", "said"),
    [
        ([(4, 0)], 0, 0, []),
        # Progress gives all restarts back.
        (
            [(1, 75), (0, 247), (2, 75), (4, 0)],
            1,
            0,
            ["ended with code 75", "a rank's SIGKILL (247) before its last step; its latest checkpoint is step-000000"],
        ),
        ([(0, "killed"), (0, 1)], 1, 1, ["SIGKILL (137)", "no checkpoint yet; given up after 2 attempts"]),
        ([(1, 2)], 5, 2, []),  # a mistake of the user's
        ([(1, 75), (2, "asked")], 5, 75, ["not started again after SIGTERM to a rank"]),  # torchrun's code is 1
        ([(0, "asked itself")], 5, 75, [f"not started again after SIGTERM to {sys.executable}"]),
        ([(3, 0), (4, 0)], 1, 0, ["ended with code 0 before its last step"]),  # deepspeed, when its launcher was killed
    ],
)
@pytest.mark.usefixtures("own_signals")
def test_a_run_is_kept_running(
    run: Path, capfd: pytest.CaptureFixture[str], attempts: Any, restarts: int, code: int, said: list[str]
) -> None:
    assert KeptRun(command(run, *attempts), run, restarts).run() == code
    assert len(list(run.glob("attempt-*"))) == len(attempts)
    console = capfd.readouterr().err
    assert all(text in console for text in said) and console.count("keep_running: ") == len(attempts) - (code in (0, 2))


@pytest.mark.usefixtures("own_signals")
def test_what_an_attempt_leaves_behind_is_ended(run: Path) -> None:
    assert KeptRun(command(run, (1, "orphan"), (4, 0)), run, 1).run() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((run / "orphan").read_text()), 0)


@pytest.mark.usefixtures("own_signals")
def test_bad_commands_and_folders_are_named(run: Path) -> None:
    with pytest.raises(UserError, match=r"cannot start deepsped .*; give the launcher's command after --"):
        KeptRun(["deepsped"], run, 1).run()
    with pytest.raises(UserError, match=r"other/config.yaml is not there; give its train.output_dir as --output-dir"):
        KeptRun(command(run, (4, 0)), run / "other", 1).run()
    with pytest.raises(UserError, match=r"attempt.py is not a folder; give the run's train.output_dir as --output-dir"):
        KeptRun(["true"], run / "attempt.py", 1)


def test_a_signal_reaches_the_ranks_and_ends_the_keeping(run: Path) -> None:
    keep = [sys.executable, "launch/keep_running.py", "--output-dir", str(run), "--", *command(run, (1, "launches"))]
    keeper = subprocess.Popen(keep, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    keeper.terminate()
    _, console = keeper.communicate(timeout=120)
    assert keeper.returncode == 75
    assert (
        "ended with code 75 before its last step; its latest checkpoint is step-00000001; not started again" in console
    )


@pytest.mark.usefixtures("own_signals")
def test_a_signal_is_passed_on_to_what_starts_and_to_what_has_just_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen(["sleep", "60"])
    ended = psutil.Process(gone.pid)
    found = keep_running.marked_processes

    def with_one_that_ends_meanwhile(variable: str, value: str) -> list[psutil.Process]:
        processes = [ended, *found(variable, value)]
        gone.kill()
        gone.wait()
        return processes

    monkeypatch.setattr(keep_running, "marked_processes", with_one_that_ends_meanwhile)
    monkeypatch.setattr(keep_running, "ranks_among", lambda processes: [])
    kept = KeptRun(["sleep", "60"], run, 1)
    kept._pass_on(signal.SIGTERM, None)  # between two attempts, or before the first
    assert kept.run() == 75


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Real launcher, real ranks; the same tool with more kills is the long version."""
    tool = [
        sys.executable,
        "tools/verify.py",
        "kills",
        "--kills",
        "1",
        "--ranks",
        "2",
        "--json",
        str(tmp_path / "kills.json"),
    ]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "kills.json").read_text())
    assert len(record["kills"]) == 1 and record["difference"] <= record["bound"]
    assert "1 of 1 kills" in done.stdout and "| killed during" in done.stdout
