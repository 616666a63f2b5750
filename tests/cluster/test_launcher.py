"""Variables of a launcher: whole, left over, or nonsense."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skvr_dist.cluster.launcher import announced_port, announced_rank, announced_world_size, is_other_rank, was_launched
from skvr_dist.errors import OneRankError, UserError

ROOT = Path(__file__).parents[2]
PREFIXES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "MPI_")
WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    return monkeypatch


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
        "run_command(lambda: start_process_group(timedelta(seconds=1)), over_ranks=True)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 75
    assert (
        "error: rank 0 waited for 1 s at port" in ended.stderr
        and "but not all 2 ranks of this run came; start" in ended.stderr
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
