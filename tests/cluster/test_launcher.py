"""Variables of a launcher: whole, left over, or nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from skvr_dist.cluster.hostfile import require_hostfile_of_launcher
from skvr_dist.cluster.launcher import (
    announced_local_size,
    announced_port,
    announced_rank,
    announced_world_size,
    host_of,
    is_other_rank,
    was_launched,
)
from skvr_dist.cluster.slurm import allocation, expand, port_of, tasks_as_ranks
from skvr_dist.errors import OneRankError, UserError
from skvr_dist.parallel.engine import process_group

ROOT = Path(__file__).parents[2]
PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "MPI_", "SLURM_", "SKVR_HOSTS")
WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    return monkeypatch


SLURM_TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[08-09],login",
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
}


def announce(monkeypatch: pytest.MonkeyPatch, words: dict[str, str]) -> None:
    for name, value in words.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "words",
    [WHOLE, {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}],
)
def test_launchers_are_understood(variables: pytest.MonkeyPatch, words: dict[str, str]) -> None:
    announce(variables, words)
    assert (announced_world_size(), announced_rank(), was_launched(), is_other_rank()) == (2, 1, True, True)


@pytest.mark.parametrize(
    "words", [{}, {"LOCAL_RANK": "1"}, {"RANK": "1"}, {"WORLD_SIZE": "1", "RANK": "3"}, {**WHOLE, "WORLD_SIZE": "1"}]
)
def test_what_is_left_over_makes_no_ranks(variables: pytest.MonkeyPatch, words: dict[str, str]) -> None:
    announce(variables, words)
    assert (announced_world_size(), announced_rank(), was_launched(), is_other_rank()) == (1, 0, False, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "announces 2 ranks, but RANK is not there, which every launcher sets; unset WORLD_SIZE if",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "announces 2 ranks, but LOCAL_RANK is not there"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE in the environment announces 2 ranks, but LOCAL_RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "but no MASTER_ADDR where they meet"),
        ({**WHOLE, "RANK": "5"}, "announces 2 ranks, but this is rank 5"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment is 0, which is no number of ranks"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment is 'two', no number; unset it or let a launcher set it"),
        ({**WHOLE, "LOCAL_RANK": ""}, ""),
    ],
)
def test_half_of_a_launcher_is_refused(variables: pytest.MonkeyPatch, words: dict[str, str], message: str) -> None:
    """It would wait for ranks that nobody starts. No other rank says it, so this one does not wait for that."""
    announce(variables, words)
    if not message:
        assert not is_other_rank()  # the end of a command does not meet a second mistake
        return
    with pytest.raises(OneRankError, match=message):
        announced_world_size()


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1"])
def test_a_port_is_a_port(variables: pytest.MonkeyPatch, port: str) -> None:
    announce(variables, {"MASTER_PORT": port})
    with pytest.raises(UserError, match=f"MASTER_PORT in the environment is '?{port}"):
        announced_port(29500)


def test_ranks_that_nobody_starts_are_waited_for_and_named(variables: pytest.MonkeyPatch) -> None:
    """The time-out belongs to the run; the variables look whole."""
    from skvr_dist.cluster.launcher import free_port

    announce(variables, {**WHOLE, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    script = (
        "from datetime import timedelta\nfrom skvr_dist.command import run_command\n"
        "from skvr_dist.parallel.engine.process_group import start_process_group\n"
        "run_command(lambda: start_process_group(timedelta(seconds=1), 'runs/r'), over_ranks=True)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75
    assert (
        "error: rank 0 waited for 1 s at port" in ended.stderr
        and "but not all 2 ranks of this run came; start rank 1 (host number 2) too" in ended.stderr
    )


@pytest.mark.parametrize(("name", "message"), [("quantum", "runs train on cuda or cpu"), ("cuda", "sees no GPU here")])
def test_an_accelerator_that_is_not_here_is_named(name: str, message: str) -> None:
    script = "import torch; torch.cuda.is_available = lambda: False\nimport skvr_dist.parallel.engine"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": name},
        capture_output=True,
        text=True,
    )
    assert f"UserError: DS_ACCELERATOR in the environment is {name}, but" in ended.stderr and message in ended.stderr


def test_tasks_of_slurm_are_ranks(variables: pytest.MonkeyPatch) -> None:
    ranks = tasks_as_ranks(SLURM_TASK)
    announce(variables, {**SLURM_TASK, **ranks})
    assert (announced_world_size(), announced_rank(), was_launched(), is_other_rank()) == (5, 3, True, True)
    assert ranks["MASTER_ADDR"] == "gpu08" and announced_local_size() == 2
    assert [host_of(rank) for rank in (0, 3, 4)] == ["gpu08", "gpu09", "login"]
    announce(variables, {"LOCAL_WORLD_SIZE": "1"})  # of the last host
    assert [host_of(rank) for rank in range(5)] == ["gpu08", "gpu08", "gpu09", "gpu09", "login"]
    announce(variables, {"SLURM_DISTRIBUTION": "cyclic"})
    assert [host_of(rank) for rank in range(5)] == ["gpu08", "gpu09", "login", "gpu08", "gpu09"]
    announce(variables, {"SLURM_STEP_TASKS_PER_NODE": "1(x3)", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"})  # torchrun
    assert [host_of(rank) for rank in (0, 1, 5)] == ["gpu08", "gpu08", "login"]
    # Two jobs may share the first host; and the user's choice is the user's.
    assert tasks_as_ranks({**SLURM_TASK, "SLURM_JOB_ID": "72"})["MASTER_PORT"] != ranks["MASTER_PORT"]
    assert tasks_as_ranks({**SLURM_TASK, "MASTER_PORT": "7"})["MASTER_PORT"] == "7"
    assert tasks_as_ranks({**SLURM_TASK, "PMI_RANK": "3", "PMI_SIZE": "5"}) == ranks  # Slurm's plugin pmi2


@pytest.mark.parametrize(
    "words",
    [
        {**SLURM_TASK, "RANK": "0"},
        {**SLURM_TASK, "OMPI_COMM_WORLD_RANK": "0"},
        {**SLURM_TASK, "PMI_RANK": "0", "PMI_SIZE": "5", "MPI_LOCALRANKID": "0"},
        {**SLURM_TASK, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_another_launcher_in_a_step_of_slurm_announces_its_own(words: dict[str, str]) -> None:
    assert tasks_as_ranks(words) == {}


def test_an_allocation_of_slurm() -> None:
    words = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_TASKS_PER_NODE": "2,1", "SLURM_JOB_ID": "71"}
    found = allocation(words)
    assert found is not None and found[:2] == (["gpu1", "gpu2"], 2) and found[2] != port_of(71, 0)
    assert allocation({}) is None
    with pytest.raises(UserError, match="not those of an allocation"):
        allocation({**words, "SLURM_TASKS_PER_NODE": "x"})


def test_half_of_slurm_is_refused() -> None:
    with pytest.raises(UserError, match=r"announces 5 tasks, but not what belongs to them .*SLURM_JOB_ID"):
        tasks_as_ranks({name: value for name, value in SLURM_TASK.items() if name != "SLURM_JOB_ID"})


@pytest.mark.parametrize(
    ("names", "hosts"),
    [
        ("", []),
        ("a", ["a"]),
        ("host[1-2]", ["host1", "host2"]),
        (
            "gpu[08-10,3]-x,b,c[1-2]d[0-1]",
            ["gpu08-x", "gpu09-x", "gpu10-x", "gpu3-x", "b", "c1d0", "c1d1", "c2d0", "c2d1"],
        ),
    ],
)
def test_a_list_of_slurms_hosts(names: str, hosts: list[str]) -> None:
    assert expand(names) == hosts


@pytest.mark.parametrize("deepspeed", ["/venv/bin/deepspeed", "/venv/bin/ds"])
@pytest.mark.parametrize("words", [["-H", "hosts"], ["--num_gpus", "2", "--hostfile", "hosts"], ["--hostfile=hosts"]])
def test_a_hostfile_that_the_launcher_did_not_find_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deepspeed: str, words: list[str]
) -> None:
    class Parent:
        def cmdline(self) -> list[str]:
            return ["/venv/bin/python", deepspeed, *words, "pretrain.py", "--hostfile", "of-the-script"]

        def cwd(self) -> str:
            return str(tmp_path)

    monkeypatch.setattr(psutil.Process, "parents", lambda process: [Parent()])
    with pytest.raises(UserError, match="given --hostfile hosts, which is not there, and has started ranks on this"):
        require_hostfile_of_launcher()
    (tmp_path / "hosts").touch()
    require_hostfile_of_launcher()


def test_an_empty_number_of_threads_is_none(variables: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    variables.setattr(process_group.torch, "set_num_threads", taken.append)
    announce(variables, {"OMP_NUM_THREADS": "", "LOCAL_WORLD_SIZE": "100000"})
    process_group._share_cores()
    assert taken == [1]
