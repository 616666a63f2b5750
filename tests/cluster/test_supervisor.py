"""A run kept on several hosts, played by agents of this machine and ranks that do as a script says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from skvr_dist.cluster import agent, supervisor
from skvr_dist.cluster.hosts_of_run import hosts_of_file
from skvr_dist.cluster.processes import marked_processes
from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
# Hosts are addresses of this machine; ssh is a script that ends with 255 for those in the file `unreachable`.
HOSTS = ["localhost", "127.0.0.2", "127.0.0.3"]
SSH = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift 2; done
! grep -qx "$1" "$PLAYED/unreachable" || exit 255
shift
sh -c "$1" &
wait $!
"""
RANK = """
import json, os, pathlib, signal, sys, time
run, number = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
attempt = len(list(run.glob(f"rank-{number}-*")))
seen = {name: os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SKVR_QUOTED")}
asked = run / f"asked-{attempt}"
signal.signal(signal.SIGTERM, lambda *_: asked.touch())
seen |= {"arguments": sys.argv[2:], "time": time.time(), "process": os.getpid()}
(run / f"rank-{number}-{attempt}").write_text(json.dumps(seen))
attempted = [run / f"rank-{each}-{attempt}" for each in range(int(seen["WORLD_SIZE"]))]
while not all(file.exists() for file in attempted):
    time.sleep(0.02)
action = json.loads((run / "script.json").read_text())[attempt].get(str(number), "wait")
(run / "config.yaml").write_text("train: {steps: 4}")
if action == "finish":
    (run / "checkpoints/step-00000004").mkdir(parents=True, exist_ok=True)
elif action == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif action == "asked before it trains":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
elif action == "wait":
    while not asked.exists():  # all ranks know it from each other
        time.sleep(0.02)
    if number == 0:
        (run / "run.json").write_text(json.dumps({"interrupted": {"by": "SIGTERM", "time": time.time()}}))
    sys.exit(75)
else:
    sys.exit(action)
"""
FAST = """
import sys
from skvr_dist.cluster import supervisor
supervisor.SECONDS_TO_SPEAK, supervisor._FIRST_PAUSE_SECONDS = 1.0, float(sys.argv.pop(1))
from skvr_dist.commands.keep_running import main
main()
"""
FINISH = {str(rank): "finish" for rank in range(6)}


class Played:
    """A run of three hosts with two ranks each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.run.mkdir()
        (folder / "unreachable").touch()
        (folder / "bin").mkdir()
        (folder / "bin/ssh").write_text(SSH)
        (folder / "bin/ssh").chmod(0o755)
        (folder / "rank.py").write_text(RANK)
        (folder / "hosts").write_text("".join(f"{name} slots=2\n" for name in HOSTS))
        self.folder, self._started = folder, list[subprocess.Popen[bytes]]()

    def start(
        self, *script: dict[str, Any], options: tuple[str, ...] = (), pause: float = 0.1
    ) -> subprocess.Popen[bytes]:
        """Start to keep a run running whose attempts go like this: what each rank does, by its number."""
        (self.run / "script.json").write_text(json.dumps(script))
        keep = ["--hostfile", str(self.folder / "hosts"), "--output-dir", str(self.run), "--patience", "15", *options]
        command = [sys.executable, "-c", FAST, str(pause), *keep, "--", str(self.folder / "rank.py"), str(self.run)]
        own = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PLAYED": str(self.folder),
            "SKVR_QUOTED": "a 'b\" $c",
        }
        self.console = self.folder / f"console-{len(self._started)}"
        with self.console.open("w") as console:  # which an agent may hold open for longer than the supervisor lives
            process = subprocess.Popen(
                [*command, "data.x=[1, 'two words']"],
                cwd=ROOT,
                env={**os.environ, **own},
                stdout=console,
                stderr=console,
            )
        self._started.append(process)
        return process

    def ended(self, process: subprocess.Popen[bytes], code: int) -> str:
        """What was said, once it has ended with that code."""
        assert process.wait(timeout=60) == code, self.console.read_text()
        return self.console.read_text()

    def seen(self, rank: int, attempt: int) -> dict[str, Any]:
        """What a rank of an attempt wrote down, once it is there."""
        file = self.run / f"rank-{rank}-{attempt}"
        wait_until(lambda: file.exists() and file.read_text() != "")
        return dict(json.loads(file.read_text()))

    def wait_for_attempt(self, attempt: int) -> None:
        for rank in range(6):
            self.seen(rank, attempt)

    def ranks(self) -> list[psutil.Process]:
        return [rank for host in range(3) for rank in marked_processes("SKVR_AGENT", f"{self.run.resolve()} {host}")]

    def agent(self, host: int) -> psutil.Process:
        words = [str(self.run.resolve()), str(host)]
        return next(p for p in psutil.process_iter() if running(p)[2:5] == ["skvr_dist.cluster.agent", *words])

    def end(self) -> None:
        for process in self._started:
            process.kill()
        wait_until(lambda: not self.ranks())


def running(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < seconds
        time.sleep(0.05)


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path)
    yield played
    played.end()


def test_ranks_get_arguments_and_environment_and_start_again_on_a_new_port(played: Played) -> None:
    interrupted_before = {"interrupted": {"by": "SIGTERM", "time": 0.0}}
    (played.run / "run.json").write_text(json.dumps(interrupted_before))
    output = played.ended(played.start({"5": "killed"}, FINISH), 0)
    assert "attempt 1: 6 ranks on localhost (2), 127.0.0.2 (2), 127.0.0.3 (2)\n" in output
    assert "rank 5 on 127.0.0.3 ended with SIGKILL (137)" in output
    assert "killed: rank 0 on localhost, rank 1 on localhost, rank 2 on 127.0.0.2, rank 3 on 127.0.0.2, " in output
    for rank, local in enumerate("010101"):
        first, second = played.seen(rank, 0), played.seen(rank, 1)
        expected = {
            "WORLD_SIZE": "6",
            "LOCAL_RANK": local,
            "SKVR_QUOTED": "a 'b\" $c",
            "arguments": ["data.x=[1, 'two words']"],
        }
        assert first.items() >= expected.items() and second.items() >= expected.items()
        assert first["MASTER_PORT"] != second["MASTER_PORT"]
    assert not (played.run / "supervisor.json").exists() and not played.ranks()


def test_a_host_that_is_silent_is_left_out_and_a_key_overridden(played: Played) -> None:
    process = played.start(
        {}, {**FINISH, "1": "finish"}, options=("--patience", "3", "--on-hosts", "2", "parallel.pipeline=1")
    )
    played.wait_for_attempt(0)
    (played.folder / "unreachable").write_text("127.0.0.2\n")
    agent = played.agent(1)
    agent.suspend()
    output = played.ended(process, 0)
    assert re.search(r"127.0.0.2 is lost, with rank 2, 3: no sign of life for 3 s", output)
    assert "attempt 2: 4 ranks on localhost (2), 127.0.0.3 (2); left out: 127.0.0.2\n" in output
    assert played.seen(1, 1)["arguments"][-1] == "parallel.pipeline=1"
    agent.resume()  # finds the supervisor gone, and ends what it has
    wait_until(lambda: not agent.is_running() and not played.ranks())


def test_ranks_die_with_their_agent_which_comes_back(played: Played) -> None:
    process = played.start({}, FINISH)
    played.wait_for_attempt(0)
    played.agent(1).kill()
    output = played.ended(process, 0)
    assert "127.0.0.2 is lost, with rank 2, 3: its agent has ended" in output and "left out" not in output


def test_a_second_start_is_refused_and_ranks_die_with_their_supervisor(played: Played) -> None:
    first = played.start({})
    played.wait_for_attempt(0)
    refused = played.ended(played.start({}), 2)
    assert f"{played.run} is kept running by process {first.pid} on localhost; wait for its end" in refused
    first.kill()
    wait_until(lambda: not played.ranks())
    played.ended(played.start({}, FINISH), 0)


@pytest.mark.parametrize(("who", "named"), [("supervisor", ""), ("agent", " on 127.0.0.3"), ("rank", " to a rank")])
def test_a_signal_to_one_reaches_all_ranks_and_ends_the_keeping(played: Played, who: str, named: str) -> None:
    process = played.start({})
    played.wait_for_attempt(0)
    told = {"supervisor": process.pid, "agent": played.agent(2).pid, "rank": played.seen(3, 0)["process"]}
    os.kill(told[who], signal.SIGTERM)
    output = played.ended(process, 75)
    assert f"not started again after SIGTERM{named}" in output and "ended with code 75" in output
    assert ("the ranks save and end" in output) == (who != "rank")


def test_a_signal_to_a_rank_that_does_not_train_yet_ends_the_keeping(played: Played) -> None:
    output = played.ended(played.start({"3": "asked before it trains"}), 75)
    assert "SIGTERM to rank 3 on 127.0.0.2: the ranks save and end" in output
    assert "not started again after SIGTERM to rank 3 on 127.0.0.2" in output


def test_restarts_wait_longer_each_time_and_are_given_up(played: Played) -> None:
    failing = {str(rank): 1 for rank in range(6)}
    output = played.ended(played.start(*[failing] * 3, options=("--restarts", "2"), pause=0.5), 1)
    assert "given up after 3 attempts without a new one" in output
    times = [played.seen(0, attempt)["time"] for attempt in range(3)]
    assert times[1] - times[0] > 0.5 and times[2] - times[1] > 1


def test_mistakes_end_it_at_once(played: Played) -> None:
    assert "started again" not in played.ended(played.start({"0": 2}), 2)
    (played.folder / "unreachable").write_text("127.0.0.3\n")
    output = played.ended(played.start({}), 2)
    assert "host 127.0.0.3 could not be started (code 255, its reason is above)" in output
    wait_until(lambda: not played.ranks())


def test_another_folder_than_the_command_trains_in_is_refused(tmp_path: Path) -> None:
    given = ["train.output_dir=~/runs/one", "train.output_dir=runs/other"]  # the last one counts
    command = ["--output-dir", "runs/one", "--ranks", "1", "--", "launch/pretrain.py", *given]
    done = subprocess.run(
        [sys.executable, ROOT / "launch/keep_running.py", *command], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "error: --output-dir is runs/one, but the command has train.output_dir=runs/other; give both the same folder",
    )


@pytest.mark.parametrize("launcher", ["deepspeed", "/venv/bin/torchrun", "launch/deepspeed.sh"])
def test_a_launcher_is_no_rank(tmp_path: Path, launcher: str) -> None:
    keep = [sys.executable, "launch/keep_running.py", "--output-dir", str(tmp_path), "--ranks", "2", "--", launcher]
    done = subprocess.run([*keep, "launch/pretrain.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert f"error: --ranks 2 starts the ranks without a launcher, and {launcher} would start more" in done.stderr


def test_a_launcher_of_several_hosts_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    launcher = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "launch/pretrain.py"]
    keep = [sys.executable, "launch/keep_running.py", "--output-dir", str(tmp_path), "--", *launcher]
    done = subprocess.run(keep, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 2 and "starts ranks on 2 hosts, of which only those of this one would be kept" in done.stderr
    )


def test_an_address_that_is_left_over_is_not_that_of_a_host_alone(tmp_path: Path) -> None:
    """Nor is a name that the host itself does not know."""
    (tmp_path / "config.yaml").write_text("train: {steps: 4}")
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    main = "import socket; from skvr_dist.commands.keep_running import main; "
    main += "socket.gethostname = lambda: 'a.invalid'; main()"
    keep = [sys.executable, "-c", main, "--output-dir", str(tmp_path), "--ranks", "1", "--", "true"]
    environment = {**os.environ, "MASTER_ADDR": "b.invalid"}
    done = subprocess.run(keep, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "attempt 1: 1 ranks on localhost (1)" in done.stderr, done.stderr


def test_the_first_host_is_this_one(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("192.0.2.1 slots=1\n")
    with pytest.raises(UserError, match=r"hosts names 192.0.2.1 first, which is not this host \(.*\); start it there"):
        hosts_of_file(tmp_path / "hosts")
    (tmp_path / "hosts").write_text("localhost slots=1\nhost2 slots=1\n")
    with pytest.raises(
        UserError, match=r"hosts names localhost first, which the other hosts take for themselves; give"
    ):
        hosts_of_file(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "Is a directory"), ('{"id": "x"}', "it is damaged"), ("[]", "it is damaged"), ("{", "it is damaged")],
)
def test_what_tells_of_no_supervisor_is_named(tmp_path: Path, content: str | None, why: str) -> None:
    """That of another user cannot be read either; root, who runs tests, reads all but a folder."""
    file = tmp_path / "supervisor.json"
    file.mkdir() if content is None else file.write_text(content)
    with pytest.raises(RunInterrupted, match=rf"found no supervisor in {file} within 0 s \({why}\)"):
        agent._connect(RunFolder(tmp_path), "", 0.0)
    assert supervisor._living_supervisor(file) is None


def test_another_users_supervisor_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "supervisor.json"

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root, who runs tests, reads all
    with pytest.raises(UserError, match=rf"{file} is another user's, whose supervisor may keep this run running"):
        supervisor._living_supervisor(file)
