"""Outputs that programs read: JSON that fits a schema, and calls of tools.

Calls are read as the usual chat templates have models write them: JSON between `<tool_call>` and `</tool_call>`
(Hermes, Qwen), or an output that is nothing but a call or a list of calls (Llama 3.1, Mistral). A call is an object
with a `name` and `arguments` (or `parameters`), which may be JSON in a text once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from skvr_dist.errors import UserError
from skvr_dist.files import naming_failure

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL)


class Schema:
    """A JSON schema; references are resolved within it, and nothing is fetched.

    Args:
        name: where it is from, for messages.

    Raises:
        UserError: it is none.
    """

    def __init__(self, content: Any, name: str) -> None:
        self._name = name
        if not isinstance(content, dict | bool):
            raise UserError(f"{name} is no JSON schema: it is a {type(content).__name__}; give an object")
        kind = validator_for(content, default=Draft202012Validator)
        try:
            kind.check_schema(content, format_checker=kind.FORMAT_CHECKER)  # patterns that are none, too
        except SchemaError as error:
            where = "/".join(map(str, error.path)) or "its root"
            raise UserError(f"{name} is no JSON schema: at {where}, {_short(error.message)}; correct it") from None
        self._validator = kind(content, registry=Registry())

    @classmethod
    def of(cls, file: Path) -> Schema:
        """The schema in a file; raises `UserError` if it cannot be read or is none."""
        with naming_failure(file):
            text = file.read_bytes()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is no JSON schema: it is not JSON ({_short(str(error))}); correct it") from None
        return cls(content, str(file))

    def accepts(self, value: Any) -> bool:
        """Whether a JSON value fits; raises `UserError` for a reference to what is not in the schema."""
        try:
            return bool(self._validator.is_valid(value))
        except Unresolvable as error:
            self._refuse_reference(error)
        except RecursionError:
            return False

    def _refuse_reference(self, error: Exception) -> NoReturn:
        raise UserError(
            f"{self._name} is no schema that stands alone: {_short(str(error))}; write what it refers to into $defs"
        ) from None


@dataclass(frozen=True)
class Call:
    """A tool and its arguments."""

    name: str
    arguments: Any = field(compare=False)
    written: str
    """The arguments as one text, by which calls are compared: to Python, true is 1."""


@dataclass(frozen=True)
class Output:
    """A decoded text, read as a program would."""

    text: str
    values: list[Any]
    """The JSON in it: all of it, or what stands between tags of calls; empty if any of that is no JSON."""
    calls: list[Call]

    @classmethod
    def of(cls, text: str) -> Output:
        """Read a text."""
        tagged = _TAGGED.findall(text)
        fenced = _FENCE.match(text.strip())
        parts = tagged or [fenced[1] if fenced else text]
        try:
            found = [_loads(part) for part in parts]
        except (ValueError, RecursionError):
            return cls(text, [], [])
        flat = [each for value in found for each in (value if isinstance(value, list) else [value])]
        calls = [_call(value) for value in flat]
        return cls(text, found, [call for call in calls if call] if calls and all(calls) else [])

    def is_valid(self, schema: Schema | None, tools: Mapping[str, Schema]) -> bool:
        """Whether it is JSON that fits; calls of tools fit where each names one and has arguments that it takes.

        Args:
            schema: of outputs that call no tools; None accepts none of them.
        """
        if not self.values:
            return False
        if tools and self.calls:
            return all(call.name in tools and tools[call.name].accepts(call.arguments) for call in self.calls)
        return schema is not None and all(schema.accepts(value) for value in self.values)


def _call(value: Any) -> Call | None:
    if not (isinstance(value, dict) and isinstance(value.get("name"), str)):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = _loads(arguments)
        except (ValueError, RecursionError):
            return None
    return None if arguments is None else Call(value["name"], arguments, json.dumps(arguments, sort_keys=True))


def _loads(text: str) -> Any:
    """Strict JSON (RFC 8259), without the infinities and NaN that Python reads too; 3.0 is the number 3."""
    return json.loads(text, parse_constant=_refuse_constant, parse_float=_number)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
