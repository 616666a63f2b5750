"""The hostfile of the deepspeed launcher, read strictly: a line per host, `host1 slots=8`.

DeepSpeed itself trains on one host when the file is not there, and numbers local ranks wrongly where slots differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from skvr_dist.errors import UserError
from skvr_dist.files import require_file

_LINE = re.compile(r"([^\s\ufeff]+)\s+slots=(\d+)\s*(?:#.*)?")


def read_hostfile(file: Path) -> tuple[list[str], int]:
    """The names of the hosts, and the slots that each has.

    Raises:
        UserError: the file is missing, a line is none, a host stands there twice, or slots differ.
    """
    require_file(file)
    slots: dict[str, int] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or int(match[2]) == 0:
            raise UserError(f"line {number} of {file} is {line!r}; write a host's name and its ranks: host1 slots=8")
        if match[1] in slots:
            raise UserError(f"line {number} of {file} names {match[1]} a second time; remove one of the lines")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"{file} names no host; write a line per host: host1 slots=8")
    first = next(iter(slots))
    for host, count in slots.items():
        if count != slots[first]:
            raise UserError(
                f"{file} gives {first} {slots[first]} slots and {host} {count}; the launcher needs the same number on "
                f"every host: lower the larger one"
            )
    return list(slots), slots[first]


def require_hostfile_of_launcher() -> None:
    """Refuse ranks that the deepspeed launcher started on this host alone because its hostfile is missing.

    Raises:
        UserError: it is; DeepSpeed has only warned.
    """
    for parent in psutil.Process().parents():
        try:
            given, folder = hostfile_among(parent.cmdline()), Path(parent.cwd())
        except (psutil.Error, OSError):  # another user's, or gone
            continue
        if given and not (folder / given).is_file():
            raise UserError(
                f"the launcher was given --hostfile {given}, which is not there, and has started ranks on this host "
                f"alone; correct the path, or leave --hostfile away"
            )


def hostfile_among(words: Sequence[str]) -> str | None:
    """The hostfile on a command line of the deepspeed launcher; what follows the script is the script's."""
    launcher = next((n for n, word in enumerate(words[:3]) if Path(word).name in ("deepspeed", "ds")), len(words))
    options = iter(words[launcher + 1 :])
    for option in options:
        if option in ("--hostfile", "-H"):
            return next(options, None)
        if option.startswith("--hostfile="):
            return option.partition("=")[2]
        if option.endswith(".py"):
            break
    return None
