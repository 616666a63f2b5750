"""The documents: their links lead somewhere, and every command in them names files and options that exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from skvr_dist.config.load import load_config

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Benchmarks are dated: they name the commands of their commit.
CURRENT = [page for page in PAGES if page.parent.name != "benchmarks"]
WITH_SUBCOMMANDS = ("tools/bench.py", "tools/estimate.py", "tools/replay.py", "tools/verify.py")


@cache
def options_of(script: str, *subcommand: str) -> set[str]:
    """As its --help tells; run in this process, which imports torch once for all scripts."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [script, *subcommand, "--help"])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not ended.value.code
    return set(re.findall(r"--[a-z][a-z_-]*", shown.getvalue()))


def commands(page: Path) -> list[list[str]]:
    """Lines of code blocks that start one of our scripts, continuation lines joined.

    A command that another one is to start, after --, counts as one of its own.
    """
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fenced if language in ("", "bash")]
    blocks += re.findall(r"(?:^    .*\n)+", text, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r" -- ", line)]
    return [shlex.split(part, comments=True) for part in parts if re.search(r"\b(tools|launch)/\w+\.py\b", part)]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page: Path) -> None:
    for words in commands(page):
        # `PROGRAM=launch/finetune.py launch/deepspeed.sh --from ...` starts that program through a file of launch/.
        at = next(i for i, word in enumerate(words) if re.fullmatch(r"(PROGRAM=)?(tools|launch)/\w+\.py", word))
        script, arguments = words[at].removeprefix("PROGRAM="), words[at + 1 :]
        subcommand = arguments[:1] if script in WITH_SUBCOMMANDS else []
        known = options_of(script, *subcommand)
        assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known, shlex.join(words)
        configs = [Path(word) for word in arguments if word.startswith("configs/")]
        assert all((ROOT / config).exists() for config in configs), shlex.join(words)
        if script == "launch/pretrain.py" and len(configs) == arguments.count("--config") > 0:
            overrides = [word for word in arguments if re.match(r"[a-z]+\.[\w.]+=", word)]
            load_config([ROOT / config for config in configs], overrides)
        if "--print-config" in arguments:
            subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True, capture_output=True)


def test_the_pages_hold_commands() -> None:
    """Guards the search above against a change of form."""
    assert len(commands(ROOT / "README.md")) >= 5
    assert len(commands(ROOT / "docs/data.md")) >= 2
