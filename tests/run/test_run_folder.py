"""One run in a folder, one branch of checkpoints in it, and one store for its ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from skvr_dist.checkpoint.folder import candidates
from skvr_dist.cluster.launcher import free_port
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.engine.process_group import start_process_group
from skvr_dist.run.folder import RunFolder
from skvr_dist.run.lock import RunLock
from skvr_dist.run.log import software_versions
from skvr_dist.train.metrics import Reporter

HOLDER = """
import pathlib, sys, time
from skvr_dist.run.lock import RunLock
from skvr_dist.train.metrics import Reporter
RunLock(pathlib.Path(sys.argv[1]), "first")
print("held", flush=True)
time.sleep(60 if sys.argv[2] == "stays" else 0)
"""


def hold(folder: Path, how: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(tmp_path, "stays")
    try:
        with pytest.raises(UserError) as refused:
            RunLock(tmp_path, "second")
        said = str(refused.value)
        assert f"{tmp_path} is in use: process {holder.pid} on {socket.gethostname()} trains run first there" in said
        assert " since 20" in said and "give another train.output_dir" in said
        copied = shutil.copytree(tmp_path, tmp_path / "copied")  # of a run that lives on, to branch off
        RunLock(copied, "branch", beat_seconds=0.2).release()
        assert "waiting up to 1 s for a sign of life" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    RunLock(tmp_path, "second").release()
    assert "waiting up to" not in capsys.readouterr().err  # as a lock says before it waits for anybody


def test_who_ends_gives_the_folder_back(tmp_path: Path) -> None:
    holder = hold(tmp_path, "ends")
    assert holder.wait() == 0
    for _ in range(3):
        RunLock(tmp_path, "next").release()
    (file,) = (tmp_path / "lock").iterdir()
    assert json.loads(file.read_text())["state"] == "free"


def other_host(folder: Path, number: int = 1, **changes: Any) -> Path:
    """A lock as a process on another host holds it."""
    (folder / "lock").mkdir(exist_ok=True)
    record = {"host": "node7", "pid": 1, "since": "2020-01-01", "run": "first", "processes": "others"}
    file = folder / f"lock/{number:08d}.json"
    file.write_text(json.dumps({**record, "process_start": "5", "state": "held", "beat": 0, **changes}))
    return file


def test_the_beat_of_another_host_decides(tmp_path: Path) -> None:
    """Not its clock, and not whether its process number is one of this host's."""
    file = other_host(tmp_path, pid=os.getpid())
    threading.Timer(0.4, lambda: other_host(tmp_path, pid=os.getpid(), beat=1)).start()
    with pytest.raises(UserError, match="on node7 trains run first there since 2020-01-01"):
        RunLock(tmp_path, "second", patience_seconds=30.0)
    started = time.monotonic()
    RunLock(tmp_path, "second", patience_seconds=1.0).release()  # the beat has stopped
    assert time.monotonic() - started > 1.0 and not file.exists()


def take(folder: str) -> str:
    try:
        RunLock(Path(folder), f"run {dist.get_rank()}", patience_seconds=0.5)
    except UserError as error:
        return str(error)
    dist.barrier()  # hold it until all have tried
    return "held"


def take_or_wait(folder: str) -> str:
    said = take(folder)
    if said != "held":
        dist.barrier()
    return said


def test_one_of_many_takes_a_dead_ones_lock(tmp_path: Path) -> None:
    other_host(tmp_path, number=3)
    said = run_ranks(4, take_or_wait, str(tmp_path))
    assert said.count("held") == 1
    winner = said.index("held")
    assert all(f"trains run run {winner} there" in text for text in said if text != "held")


STANDS_STILL = """
import pathlib, sys, time
from skvr_dist.run.lock import RunLock
from skvr_dist.train.metrics import Reporter
RunLock(pathlib.Path(sys.argv[1]), "first", beat_seconds=0.1)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("removed", "number"), [(False, 3), (True, 2), (True, 1)])
def test_who_was_taken_over_ends(tmp_path: Path, removed: bool, number: int) -> None:
    """Also where the folder was removed, by someone who had forgotten it, and another run has begun there."""
    other_host(tmp_path, number=1, state="free")
    holder = subprocess.Popen(
        [sys.executable, "-c", STANDS_STILL, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    if removed:
        shutil.rmtree(tmp_path / "lock")
    other_host(tmp_path, number=number)
    _, said = holder.communicate(timeout=30)
    assert holder.returncode == 2
    assert f"another process has taken {tmp_path} over" in said


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot lock .*/file/run \(Not a directory"):
        RunLock(tmp_path / "file/run", "first")


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    RunFolder(tmp_path).note(id="abc")
    RunFolder(tmp_path).note(resume="auto")
    assert RunFolder(tmp_path).notes() == {"id": "abc", "resume": "auto"}


def meet(port: int, run_of: dict[int, tuple[str, int, int]], folder: str) -> Any:
    """Leave the group of this test, and come together again as told, by one port."""
    number = dist.get_rank()
    run, rank, world_size = run_of[number]
    dist.barrier()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_PORT=str(port))
    import deepspeed.comm.comm as deepspeed_comm

    deepspeed_comm.cdb = None
    try:
        start_process_group(timedelta(seconds=60 if run == "a" else 3), f"/runs/{run}", run if rank == 0 else "")
    except (UserError, RuntimeError) as error:
        return str(error)
    finally:
        (Path(folder) / str(number)).touch()
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, (run, rank))
    while rank == 0 and len(list(Path(folder).iterdir())) < len(run_of):  # the store is here
        time.sleep(0.05)
    return found


def test_a_rank_of_another_run_at_the_same_port_is_not_taken_in(tmp_path: Path) -> None:
    """It waits for its own rank 0, while the others train."""
    ranks = {0: ("a", 0, 2), 1: ("a", 1, 2), 2: ("b", 1, 2)}
    *met, stranger = run_ranks(3, meet, free_port(), ranks, str(tmp_path))
    assert met == [[("a", 0), ("a", 1)]] * 2
    assert "rank 1 waited for 3 s at port" in stranger and "give each run a MASTER_PORT of its own" in stranger


def test_two_starts_of_one_run_at_one_port_keep_apart(tmp_path: Path) -> None:
    """The second run's own store could not be opened, or is yet to come: its rank finds that of the first."""
    ranks = {0: ("a", 0, 2), 1: ("a", 1, 2), 2: ("a", 1, 2)}
    met = run_ranks(3, meet, free_port(), ranks, str(tmp_path))
    assert met[0] == [("a", 0), ("a", 1)]
    told, other = sorted(met[1:], key=lambda found: isinstance(found, list))
    assert other == met[0]
    assert "rank 1 of run a is process " in told and "comes as the same; end the other start of this run" in told


@pytest.mark.parametrize("name", ["", "checkpoints", "tensorboard", "logs", "lock"])
def test_a_file_where_a_folder_must_be_is_named_before_the_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / name
    if not name:
        place.rmdir()
    place.touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"cannot write .*/run.*: .*{place.name} is not a folder"):
        RunFolder(tmp_path / "run").prove_writable()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_elsewhere_is_refused() -> None:
    with pytest.raises(UserError, match="is a URL, but only paths of this machine"):
        RunFolder("s3://bucket/run")
    assert RunFolder("~/run").path == Path.home() / "run"


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        script = "from skvr_dist.parallel.engine.process_group import start_process_group as s; s()"
        ranks = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ended = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | ranks, capture_output=True, text=True, timeout=60
        )
        assert f"port {port} of 127.0.0.1, where the ranks are to meet, is in use; give the launcher" in ended.stderr
        ranks |= {"MASTER_ADDR": "no-such-host.invalid", "RANK": "1"}
        ended = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | ranks, capture_output=True, text=True, timeout=60
        )
        assert "host no-such-host.invalid (MASTER_ADDR), where the ranks are to meet, has no address" in ended.stderr


def test_files_of_a_run_may_hold_what_a_crash_left(tmp_path: Path) -> None:
    """A file system may fill the end of a file with zeros; the run goes on without such lines."""
    folder = RunFolder(tmp_path)
    whole = b'{"step": 1, "train/loss": 2.5}\n{"step": 2, "train/loss": null}\n'
    folder.metrics.write_bytes(whole + b"\0" * 40 + b"\n[1]\n\xff\n" + b"[" * 100_000 + b'\n{"step": 3, "train/lo')
    records = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None}]
    assert folder.metric_records() == records
    Reporter(0, folder, first_step=1, steps=4, console_lost=lambda: None).close()
    assert folder.metric_records() == records[:1] and folder.metrics.read_bytes() == whole[: whole.index(b"\n") + 1]
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(UserError, match=r"run.json is damaged \(it holds no facts\); remove it"):
        folder.notes()
    for name in ("step-notanumb", "step-00000002"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert [path.name for path in candidates(folder.checkpoints)] == ["step-00000002"]
    folder.lock.mkdir()
    (folder.lock / "notes.json").touch()
    RunLock(tmp_path, "run").release()


def test_a_console_that_has_gone_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lost: list[str] = []
    with os.fdopen(writer, "w", buffering=1) as console:
        monkeypatch.setattr(sys, "stdout", console)
        reporter = Reporter(0, RunFolder(tmp_path), first_step=0, steps=4, console_lost=lambda: lost.append("lost"))
        for _ in range(2):
            reporter.say("nobody reads this")
        reporter.close()
    assert lost == ["lost"]


def test_the_version_of_a_checkout_is_the_installed_one() -> None:
    """A run notes it without asking what is installed: a checkout on PYTHONPATH runs, too."""
    assert software_versions()["skvr-dist"] == version("skvr-dist")
