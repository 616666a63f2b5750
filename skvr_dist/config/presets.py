"""Configurations that come with the package, by name: `quickstart` or `experiment/quickstart`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from skvr_dist.errors import UserError
from skvr_dist.files import local_path

# In a checkout a link to configs/ at the top; a wheel holds the files themselves.
PRESETS = Path(__file__).parents[1] / "configs"


def preset_names() -> list[str]:
    """Every preset as FOLDER/NAME, sorted."""
    return sorted(file.relative_to(PRESETS).with_suffix("").as_posix() for file in PRESETS.glob("*/*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a path that exists, or else a preset with or without its folder.

    Raises:
        UserError: there is neither, or presets of several folders have that name.
    """
    path = local_path(name)
    if path.exists() and not path.is_dir():
        return path
    known = preset_names()
    wanted = str(name).removesuffix(".yaml")
    found = [preset for preset in known if wanted in (preset, preset.partition("/")[2])]
    if len(found) > 1:
        raise UserError(f"configuration {name} could be the preset {' or '.join(found)}; name its folder too")
    if found:
        return PRESETS / f"{found[0]}.yaml"
    if path.is_dir():
        return path  # reading it says what is wrong with it
    by_last = {preset.partition("/")[2]: preset for preset in known}
    near = difflib.get_close_matches(Path(wanted).name, by_last, n=2)
    hint = f"did you mean {' or '.join(by_last[name] for name in near)}?" if near else f"presets are {', '.join(known)}"
    raise UserError(f"cannot read configuration {name}: there is no such file, and no preset of that name; {hint}")


def find_configs(names: Iterable[str | Path]) -> list[Path]:
    """The files of several configurations, in their order. Raises as `find_config` does."""
    return [find_config(name) for name in names]
