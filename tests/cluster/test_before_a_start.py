"""What is read and written before ranks exist: hostfiles, variables, arguments, addresses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from skvr_dist.cluster.arguments import pack, unpack
from skvr_dist.cluster.hostfile import read_hostfile
from skvr_dist.cluster.network import (
    address_towards,
    addresses,
    interface_of,
    leads_nowhere,
    listen,
    use_interface,
    way_between,
)
from skvr_dist.cluster.preflight.talk import _tournament
from skvr_dist.cluster.variables import as_deepspeed_file, in_words, passed_variables
from skvr_dist.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("# ours\n\nb slots=4\na  slots=4 # the old one\n")
    assert read_hostfile(file) == (["b", "a"], 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no host"),
        ("a slots=1\na slots=1\n", "line 2 of .*hostfile names a a second time"),
        ("a slots=2\nb slots=1\n", "gives a 2 slots and b 1; the launcher needs the same number"),
        ("a slots=0\n", "line 1 of .* is 'a slots=0'"),
        ("a slots=1\nb\n", "line 2 of .* is 'b'; write a host's name"),
        ("a slot=1\n", "line 1 of .* is 'a slot=1'"),
        ("\ufeffa slots=1\n", r"line 1 of .* is '\\ufeffa slots=1'"),  # which launchers take for a part of the name
    ],
)
def test_a_hostfile_with_a_mistake(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "hostfile"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_hostfile(file)


def test_arguments_survive_as_one_word() -> None:
    words = ["--config", "a b", "x={points: [[0.0, 0.0]]}", "'\"$`\\%h", "ä"]
    packed = pack(words)
    assert unpack(["--local_rank=0", packed, "z"]) == ["--local_rank=0", *words, "z"]
    shown = subprocess.run(["sh", "-c", f"printf %s {packed}"], capture_output=True, text=True).stdout
    assert shown == packed
    with pytest.raises(UserError, match="is no packed command line"):
        unpack(["--packed-arguments=x"])


def test_which_variables_are_passed() -> None:
    environment = {
        "PATH": "/a:/b",
        "NCCL_DEBUG": "INFO",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": "secret",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "LD_LIBRARY_PATH": "/lib",
        "MINE": "1",
        "PYTHON_LINES": "a\nb",
        "DS_ENV_FILE": "/x",
    }
    passed = passed_variables(environment, also=["MINE"])
    assert " ".join(passed) == (
        "DS_ACCELERATOR LD_LIBRARY_PATH MINE NCCL_DEBUG OMP_NUM_THREADS PATH TOKENIZERS_PARALLELISM"
    )
    assert in_words({"A": "1", "B": "x" * 99}) == f"A=1 B={'x' * 80}..."


def test_values_survive_deepspeeds_file_and_a_shell() -> None:
    """As DeepSpeed and pdsh treat them: quoted where a letter is unusual, what follows a percent sign replaced."""
    odd = "a \"b\" $HOME `c` \\ 'd' %h (e)"
    line = as_deepspeed_file({"ODD": odd}).removesuffix("\n")
    name, value = line.split("=", maxsplit=1)
    replaced = value.replace("%%", "%")
    shown = subprocess.run(
        ["bash", "-c", f'export {name}="{replaced}"; printf %s "$ODD"'], capture_output=True, text=True
    )
    assert shown.stdout == odd and "%h" not in value.replace("%%", "")


def _has_ipv6() -> bool:
    return "::1" in addresses().get("lo", [])


def test_the_address_that_others_can_mean_a_host_by() -> None:
    first = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["fd00::1", "10.0.0.1"], "ib0": ["10.1.0.1"]}
    other = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eth0": ["10.0.0.2"]}
    assert way_between(first, [other]) == "10.0.0.1"
    assert way_between({"br0": ["172.17.0.1"]}, [other]) is None  # the other one has it, too
    assert interface_of("10.1.0.1", first) == "ib0" and interface_of("10.1.0.9", first) is None
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with listen() as listening:
        port = listening.getsockname()[1]
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))[: 1 + _has_ipv6()]:
            with socket.socket(family) as caller:
                caller.connect((address, port))
    assert leads_nowhere("docker0") and leads_nowhere("lo") and not leads_nowhere("eth0") and not leads_nowhere("br0")


def test_an_interface_that_the_user_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    assert use_interface("eth0") == {"NCCL_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")]), ids=lambda s: s.name
)
def test_a_script_of_launch_is_one(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("deepspeed.sh", {}, "there is no tools/preflight.py in {here}; start this in the checkout"),
        ("mpirun.sh", {}, "there is no tools/preflight.py in {here}; start this in the checkout"),
        ("slurm.sbatch", {}, "there is no tools/preflight.py in {here}; start this in the checkout"),
        ("torchrun.sh", {"FIRST": "a", "HOSTS": "1"}, "there is no launch/pretrain.py in {here}; start this in the"),
        ("torchrun.sh", {"PROGRAM": __file__, "HOSTS": "1"}, "FIRST is empty; give the name of the host where all"),
        ("torchrun.sh", {"PROGRAM": __file__, "FIRST": "a"}, "HOSTS is ''; give the number of hosts that run this"),
    ],
)
def test_a_script_says_what_it_lacks(tmp_path: Path, script: str, variables: dict[str, str], message: str) -> None:
    command = ["bash", str(ROOT / "launch" / script), "--config", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 2 and f"error: {message.format(here=tmp_path)}" in done.stderr, done.stderr


def test_asked_for_its_help_the_script_starts_nothing_of_an_earlier_call(tmp_path: Path) -> None:
    settled = tmp_path / ".cache/skvr-launch/here-29500"
    settled.mkdir(parents=True)
    for name in ("address", "environment", "arguments"):
        (settled / name).write_text("")
    launcher = tmp_path / "deepspeed"
    launcher.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    launcher.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(tmp_path), "HOSTNAME": "here", "PATH": path}
    done = subprocess.run(["launch/deepspeed.sh", "--help"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: preflight.py" in done.stdout and not (tmp_path / "started").exists()


@pytest.mark.parametrize("size", range(2, 9))
def test_every_two_hosts_meet_once(size: int) -> None:
    turns = _tournament(size)
    met = [pair for turn in turns for pair in turn]
    assert sorted(met) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    assert all(len({host for pair in turn for host in pair}) == 2 * len(turn) for turn in turns)


def test_mpirun_passes_what_the_preflight_prints(tmp_path: Path) -> None:
    programs = {
        "python": f'[ "$1" = tools/preflight.py ] || exec {sys.executable} "$@"',
        "mpirun": 'echo "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NCCL_DEBUG": "WARN", "MASTER_PORT": "7", "MINE": "1"}
    shown = {
        named: subprocess.run(
            ["launch/mpirun.sh"], cwd=ROOT, env={**os.environ, **own, "PASSED": named}, capture_output=True, text=True
        ).stdout
        for named in ("", "MINE")
    }
    assert "-x MASTER_PORT" in shown[""] and shown[""].count("MASTER_PORT") == 1 and "-x NCCL_DEBUG" in shown[""]
    assert "-x MASTER_PORT -x MINE python launch/pretrain.py" in shown["MINE"]


def test_a_job_of_slurm_is_requeued_while_it_saves(tmp_path: Path) -> None:
    run, settled = tmp_path / "my run", tmp_path / "checkout/.skvr-job-7"
    stubs = {
        "python": f"mkdir -p '{settled}'; echo '{run}' > '{settled}/run'",
        "srun": f'[ -z "$SAVES" ] || mkdir -p "{run}/checkpoints/step-0000000$SAVES"; exit $CODE',
        "scontrol": f'echo "$@" >> "{tmp_path}/asked"',
    }
    for each in ("tools/preflight.py", "launch/pretrain.py"):
        (settled.parent / each).parent.mkdir(parents=True)
        (settled.parent / each).touch()
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    own["SLURM_RESTART_COUNT"] = "9"  # most of them by Slurm itself

    def start(code: int, saves: str = "") -> bool:
        """Whether the job is requeued."""
        (tmp_path / "asked").write_text("")
        env = {**os.environ, **own, "CODE": str(code), "SAVES": saves}
        script = ["bash", str(ROOT / "launch/slurm.sbatch")]
        done = subprocess.run(script, cwd=settled.parent, env=env, capture_output=True, text=True)
        assert done.returncode == code
        is_requeued = (tmp_path / "asked").read_text() == "requeue 7\n"
        assert is_requeued or code in (0, 2) or "without a new checkpoint" in done.stderr
        return is_requeued

    assert [start(code) for code in (75, 137, 75)] == [True] * 3
    assert start(137, saves="1") and [start(75) for _ in range(4)] == [True, True, True, False]
    assert not start(0) and not start(2) and not settled.exists()
