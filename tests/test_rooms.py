"""The rooms of the house: who may import whom, and the one that knows DeepSpeed (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the bottom to the top: a room imports those before it. A folder that is not named belongs to the one around it.
ROOMS = [
    "errors",
    "section",
    "schedule",
    "files",
    "host_group",
    "routing",
    "config",
    "model",
    "run",
    "data",
    "checkpoint",
    "cluster",
    "parallel",
    "parallel.pipeline",
    "parallel.engine",
    "train",
    "evaluate",
    "sweep",
    "hf",
    "serve",
    "lab",
    "command",
    "commands",
]
# One prepares other people's models for their own DeepSpeed, which they have if they use it; one is the loop that they
# would write with it.
OTHERS_WITH_DEEPSPEED = {"skvr_dist.hf.model.rcla", "skvr_dist.lab.bench.plain_loop"}


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module below these folders, by its name."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def imports(*folders: str) -> Iterator[tuple[str, list[str]]]:
    """Every module below these folders, with the names that it imports, inside functions too."""
    for name, tree in trees(*folders):
        imported: list[str] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{name} has a relative import in line {node.lineno}"
                imported += [f"{node.module}.{alias.name}" for alias in node.names]
        yield name, imported


def room_of(name: str) -> int | None:
    """The place in `ROOMS` of a module or of a name in it; None for other packages and for the library's version."""
    inside = [number for number, room in enumerate(ROOMS) if f"{name}.".startswith(f"skvr_dist.{room}.")]
    return max(inside, key=lambda number: len(ROOMS[number]), default=None)


def test_every_module_is_in_a_room() -> None:
    assert [name for name, _ in trees("skvr_dist") if room_of(name) is None] == ["skvr_dist"]


def test_imports_point_one_way() -> None:
    wrong = []
    for name, imported in imports("skvr_dist"):
        mine = room_of(name)
        for other in imported:
            theirs = room_of(other)
            if mine is not None and theirs is not None and theirs > mine:
                wrong.append(f"{name} ({ROOMS[mine]}) imports {other} ({ROOMS[theirs]})")
    assert not wrong, "\n".join(wrong)


def test_no_function_is_longer_than_60_lines() -> None:
    long = []
    for name, tree in trees("skvr_dist", "launch", "tools", "tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= 60:
                long.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long, "\n".join(long)


def test_one_room_knows_deepspeed() -> None:
    knowing = {
        name
        for name, imported in imports("skvr_dist", "launch", "tools")
        if any(other.split(".")[0] == "deepspeed" for other in imported)
    }
    assert {name for name in knowing if not name.startswith("skvr_dist.parallel.engine")} == OTHERS_WITH_DEEPSPEED


def test_private_attributes_of_engine_and_optimizer_stay_in_that_room() -> None:
    """By the name of what they are read from."""
    found = []
    for name, tree in trees("skvr_dist", "launch", "tools"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if owner in ("engine", "optimizer") and not name.startswith("skvr_dist.parallel.engine"):
                    found.append(f"{name} line {node.lineno}: {owner}.{node.attr}")
    assert not found, "\n".join(found)
