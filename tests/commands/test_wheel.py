"""The wheel, installed where no checkout is: presets by name, training, retention and export, as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from skvr_dist.cluster.launcher import free_port
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.tokenizers.train import train_tokenizer

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "train.steps=2",
    "train.warmup_steps=1",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.output_dir=run",
    "data.sequence_length=32",
    "data.lanes=4",
    "data.train=data/train",
    "data.validation=data/validation",
    "data.tokenizer=data/tokenizer.model",
    "evaluate.sequences=4",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel of this checkout, and all else from the running one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind, and takes those that an earlier one has left
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("skvr_dist", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, "wheel", str(source), *made], check=True, timeout=120)
    [wheel] = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    programs = folder / "venv/bin"
    python = str(programs / "python")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True, timeout=60)
    # Only the folder itself: its .pth files, an editable install's among them, count where it is a site folder.
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    (Path(site) / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def start(installed: Path, folder: Path, *command: str) -> str:
    """Run a program of the environment in a folder; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{installed}:{environment['PATH']}"}
    line = [str(installed / command[0]), *command[1:]]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_does_the_main_job(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    corpus = open_corpus(str(Path(os.__file__).parent / "email"), suffixes=(".py",))
    tokenizer = train_tokenizer(corpus, vocab_size=512)
    tokenizer.save(tmp_path / "data/tokenizer.model")
    prepare(corpus, tokenizer, tmp_path / "data", num_shards=4, validation_share=0.25, workers=1)

    where = start(installed, tmp_path, "python", "-c", "import skvr_dist; print(skvr_dist.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    preset = ["--config", "quickstart", *SMALL]
    assert "4 = 2 stages x 2 replicas" in start(
        installed, tmp_path, "skvr-pretrain", *preset, "--dry-run", "--world-size", "4"
    )
    launcher = ["python", "-c", "from deepspeed.launcher.runner import main; main()"]  # its program has another python
    launcher += ["--num_gpus", "2", "--master_port", str(free_port()), "--log_level", "error"]
    printed = start(installed, tmp_path, *launcher, "--module", "skvr_dist.commands.pretrain", *preset)
    assert "2 ranks: 2 stages x 1 replicas" in printed and "step 2/2  loss " in printed
    assert "step 2 loss" in start(
        installed, tmp_path, "skvr-retention", "run", "--strategies", "full", "--sequences", "8"
    )
    assert "texts agree" in start(installed, tmp_path, "skvr-export", "run", "exported")
    assert (tmp_path / "exported/config.json").exists()


def test_every_console_command_shows_its_help(installed: Path, tmp_path: Path) -> None:
    commands = sorted(program.name for program in installed.glob("skvr-*"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert commands == sorted(project["scripts"])
    for command in commands:
        assert start(installed, tmp_path, command, "--help").startswith(f"usage: {command} ")
