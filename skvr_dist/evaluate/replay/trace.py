"""Traces: jsonl files of requests, each with the second at which it arrives.

{"arrival": 0.35, "prompt": "def main(", "max_tokens": 64}
{"arrival": 1.2, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32, "name": "greeting"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from skvr_dist.data.finetune.examples import ExampleError
from skvr_dist.data.finetune.formats import parsed
from skvr_dist.data.prepare.formats import read_lines
from skvr_dist.errors import UserError
from skvr_dist.section import Section

_KIND = "requests"
_EXPECTED = "arrival (seconds, at least 0), prompt (a text) or messages[] of {role, content}, and max_tokens; also name"


class _Record(Section):
    """A line of the file."""

    arrival: float = Field(ge=0)
    prompt: str = ""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    max_tokens: int = Field(ge=1)
    name: str = ""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> _Record:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("has not one of prompt and messages")
        if any(not isinstance(message.get("role"), str) for message in self.messages):
            raise ValueError("a message has no role")
        return self


@dataclass(frozen=True)
class Request:
    """A request of a trace."""

    arrival: float
    """Seconds after the beginning of the trace."""
    max_tokens: int
    """Tokens wanted, at most."""
    prompt: str = ""
    """A text to continue; or else there are messages."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """A chat to answer."""
    name: str = ""
    """For people: what it is about."""
    place: str = ""
    """Where it is from, for messages."""

    @property
    def shown(self) -> str:
        """What people are shown of it: the text, or what was said last."""
        return self.prompt or str(self.messages[-1].get("content") or "")


def read_trace(path: Path) -> list[Request]:
    """The requests of a file in the order in which they arrive.

    Raises:
        UserError: the file cannot be read, holds no requests, or a line is none.
    """
    requests = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ExampleError(place, f"record of {_KIND}", f"it is not JSON: {error}", _EXPECTED) from None
        requests.append(Request(**parsed(_Record, record, place, _KIND, _EXPECTED).model_dump(), place=place))
    if not requests:
        raise UserError(f"{path} holds no requests; expected a line for each, with {_EXPECTED}")
    return sorted(requests, key=lambda request: request.arrival)


def as_lines(requests: Iterable[Request]) -> str:
    """The text of a trace's file."""
    records = ({key: value for key, value in vars(each).items() if value and key != "place"} for each in requests)
    return "".join(json.dumps({"arrival": 0.0, **record}) + "\n" for record in records)


def poisson_arrivals(count: int, rate: float, generator: np.random.Generator) -> Sequence[float]:
    """Seconds at which independent users ask, to the millisecond: gaps are exponential, `rate` requests a second."""
    return [round(float(second), 3) for second in np.cumsum(generator.exponential(1 / rate, count))]
