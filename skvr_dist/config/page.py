"""docs/configuration.md, made from the sections themselves: every key, its values, its default and its meaning.

python -m skvr_dist.config.page > docs/configuration.md
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from skvr_dist.config.tree import Config
from skvr_dist.schedule import Schedule
from skvr_dist.section import Section, section_in

_HEAD = """# Configuration

A run is configured by YAML files, later ones over earlier ones, and by `section.key=value` on the command line; a file
may `include:` others, which come before it. Sections are merged key by key, named ones too: `data.train=null` before
`data.train={...}` takes away those that were there. `--print-config` prints what results. An unknown key, a value of
another type or an impossible combination ends the command with one sentence per mistake, before anything starts.

This page is made from the sections in `skvr_dist/config/`, `skvr_dist/routing/config.py` and `skvr_dist/schedule.py`;
`make docs` writes it anew.
"""
_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "anything"}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def as_page() -> str:
    """The page, in Markdown."""
    parts = [_HEAD]
    for name, field in Config.model_fields.items():
        section = section_in(field.annotation)
        parts.append(f"## {name}\n\n{_about(section)}" if section else f"## {name}\n\n{_meaning(field)}\n")
    parts.append(f"## Schedules\n\n{_about(Schedule)}")
    return "\n".join(parts)


def _about(section: type[Section]) -> str:
    """A section's description, and a table of its keys and those of the sections within."""
    rows = ["| key | values | default | meaning |", "|---|---|---|---|", *_rows(section, "")]
    return f"{_joined(inspect.getdoc(section))}\n\n" + "\n".join(rows) + "\n"


def _rows(section: type[Section], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        key, inner = prefix + name, section_in(field.annotation)
        if inner is not None and inner is not Schedule:
            of_many = get_origin(field.annotation) is dict
            if of_many or field.description:
                kind = "sections by name" if of_many else "section"
                rows.append(f"| `{key}` | {kind} | {_default(field)} | {_meaning(field)} |")
            rows += _rows(inner, f"{key}.NAME." if of_many else f"{key}.")
            continue
        rows.append(f"| `{key}` | {_values(field)} | {_default(field)} | {_meaning(field)} |")
    return rows


def _values(field: FieldInfo) -> str:
    metadata = [*field.metadata, *_metadata_in(field.annotation)]
    bounds = [f"{_SIGNS[sign]} {getattr(each, sign)}" for each in metadata for sign in _SIGNS if _bound(each, sign)]
    return ", ".join([_type(field.annotation), *bounds])


def _metadata_in(annotation: Any) -> Iterator[Any]:
    """What is said of the forms that a key may have, within its annotation."""
    for inner in get_args(annotation):
        if isinstance(inner, FieldInfo):
            yield from inner.metadata
        yield from _metadata_in(inner)


def _bound(constraint: Any, sign: str) -> bool:
    return getattr(constraint, sign, None) is not None


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if annotation is Schedule:
        return "[schedule](#schedules)"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(each) for each in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"{_type(inner[1])} by name"
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, Section):
        return "as below"
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _meaning(field: FieldInfo) -> str:
    return _joined(field.description).replace("|", "\\|")


def _joined(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(as_page(), end="")
