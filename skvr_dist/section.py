"""The base of every configuration section: strict, immutable, no unknown keys."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """A node of the configuration tree.

    Strict: a string is never taken for a number, and an unknown key is an error. Frozen: what was validated is what
    runs. The text below a field is its description (docs/configuration.md). The tree is `skvr_dist.config.tree.Config`.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a key may hold: alone, as one of several forms, or by names that the user gives."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_in(inner)) is not None), None)


def dotted(keys: Iterable[int | str]) -> str:
    """The path of a key, in one line whatever a key is called."""
    return ".".join(text if (text := str(key)).isprintable() else repr(text) for key in keys)


def in_words(error: ValidationError) -> str:
    """What is wrong with the values of a model, in one line."""
    found = []
    for item in error.errors():
        where = dotted(item["loc"])
        what = item["msg"].removeprefix("Value error, ")
        found.append(f"{where}: {what}" if where else what)
    return "; ".join(found)
