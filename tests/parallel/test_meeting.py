"""Where the ranks of several hosts meet, and the interface that they use."""

from __future__ import annotations

import os
import re
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from skvr_dist.cluster.launcher import free_port
from skvr_dist.errors import UserError
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.parallel.engine import meeting_store, process_group, refusals
from skvr_dist.run.folder import RunFolder
from skvr_dist.train import shared_folder

TWO_HOSTS = {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host1"}


@pytest.fixture
def on_two_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TWO_HOSTS.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_no_meeting_at_dockers_bridge(on_two_hosts: pytest.MonkeyPatch) -> None:
    on_two_hosts.setattr(process_group, "resolve", lambda host: "172.17.0.1")
    on_two_hosts.setattr(process_group, "interface_of", lambda address: "docker0")
    with pytest.raises(UserError, match=r"is 172.17.0.1, which is docker0 of .*; give the launcher --master_addr"):
        process_group._require_way_to("host1")
    on_two_hosts.setenv("LOCAL_WORLD_SIZE", "2")  # all on this host
    process_group._require_way_to("host1")


@pytest.mark.parametrize(
    ("ways", "towards", "interface"),
    [
        (["10.0.0.1", "10.0.0.1"], "10.0.0.2", "eth2"),  # the second host: from where it reaches the first
        (["", "10.0.0.1"], "127.0.1.1", "eth1"),  # the first, to itself 127.0.1.1: as the second sees it
        (["", ""], "127.0.0.1", None),  # two launchers on one host
    ],
)
def test_the_interface_by_which_others_reach_this_host(
    on_two_hosts: pytest.MonkeyPatch, ways: list[str], towards: str, interface: str | None
) -> None:
    store = dist.HashStore()
    for rank, way in enumerate(ways):
        store.set(f"way/{rank}", way)
    on_two_hosts.setattr(process_group, "address_towards", lambda host: towards)
    on_two_hosts.setattr(process_group, "interface_of", {"10.0.0.1": "eth1", "10.0.0.2": "eth2"}.get)
    process_group._settle_interface(store, 2)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == os.environ.get("NCCL_SOCKET_IFNAME") == interface


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(shared_folder.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(shared_folder, "_PATIENCE_SECONDS", 0.2)
    shared, other = RunFolder(tmp_path / "shared"), RunFolder(tmp_path / "other")
    for folder in (shared, other):
        folder.path.mkdir()
        folder.note(id="one", start="before")
    shared_folder.require_shared_folder(shared, 0, 2)
    shared_folder.require_shared_folder(shared, 1, 2)
    with pytest.raises(UserError, match=r"/other on host .* \(rank 1\) is not the folder that rank 0 writes to"):
        shared_folder.require_shared_folder(other, 1, 2)


def test_what_listens_but_is_no_store_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch waits for the first word of what it has connected to, without end."""
    monkeypatch.setattr(meeting_store, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(meeting_store, "TCPStore", lambda *words, **options: time.sleep(5))
    for name, value in {**TWO_HOSTS, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"what listens at port {port} of 127.0.0.1, .* is not rank 0 of a run"):
            meeting_store.open_store(1, 2, timedelta(seconds=1))


HOST_EACH = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
TASKS_OF_SRUN = {"LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}


def begin(ports: list[int], refusing: dict[int, tuple[int, str]], environment: dict[str, str]) -> list[tuple[str, str]]:
    """Begin a run per port, in which one of two ranks meets something before it joins."""
    number, found = dist.get_rank(), []
    dist.destroy_process_group()
    os.environ.update(environment)
    for port in ports:
        rank, what = refusing[port]
        os.environ["MASTER_PORT"] = str(port)
        try:
            with refusals.telling_who_waits("runs/one"):
                if number == rank:
                    raise {"a user's": UserError("host2 lacks data/train"), "not": OSError("no such device")}[what]
            process_group.start_process_group(timedelta(minutes=30), "runs/one", "id" if number == 0 else "")
        except (UserError, OSError) as error:
            found.append((type(error).__name__, str(error)))
    return found


def test_what_one_host_meets_before_the_meeting_ends_all() -> None:
    refusing = {free_port(): (1, "a user's"), free_port(): (0, "a user's"), free_port(): (1, "not")}
    first, second = run_ranks(2, begin, list(refusing), refusing, HOST_EACH)
    heard = [first[0], second[1], first[2]]
    assert [kind for kind, _ in heard] == ["UserError", "UserError", "RunInterrupted"]
    assert re.fullmatch(r"rank 0 does not begin, because rank 1 on \S+ has ended: host2 lacks data/train", heard[0][1])
    assert heard[1][1].startswith("rank 1 does not begin, because rank 0 on ")
    assert heard[2][1].endswith("has ended: OSError: no such device")
    assert [text for _, text in (second[0], first[1])] == ["host2 lacks data/train"] * 2


def test_srun_ends_no_other_task_so_they_are_told() -> None:
    refusing = {free_port(): (0, "a user's")}
    (first,), (second,) = run_ranks(2, begin, list(refusing), refusing, TASKS_OF_SRUN)
    assert first == ("UserError", "host2 lacks data/train")
    assert second[0] == "UserError" and second[1].startswith("rank 1 does not begin, because rank 0 on ")
