"""What fine-tuning examples are, and the errors of the files that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skvr_dist.errors import UserError


@dataclass(frozen=True)
class QuestionAnswer:
    """A question about a context, and the answer to be learned."""

    passages: tuple[str, ...]
    """The parts of the context, in the order of the file."""
    question: str
    answer: str
    place: str
    """Where it is from, for messages."""
    others: tuple[str, ...] = ()
    """Other answers that are as right."""
    group: str = ""
    """What it is counted with when answers are measured."""
    scored: tuple[str, ...] | None = None
    """What its benchmark scores answers against, where that is not `answer` and `others`."""

    @property
    def right(self) -> tuple[str, ...]:
        """What an answer is scored against."""
        return (self.answer, *self.others) if self.scored is None else self.scored


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the assistant's turns are to be learned."""

    messages: tuple[dict[str, Any], ...]
    """Each with the keys `role` and `content`, and what else of `SAID_BESIDE` it has."""
    place: str
    """Where it is from, for messages."""
    tools: tuple[dict[str, Any], ...] = ()
    """Those that the assistant may call, as functions of the OpenAI API."""


SAID_BESIDE = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""What a message may say beside its content, by the names of usual interfaces."""


class ExampleError(UserError):
    """A record is no example; the message names it, what is wrong and what was expected."""

    def __init__(self, place: str, kind: str, why: str, expected: str) -> None:
        super().__init__(f"{place} is no {kind} ({why}); expected {expected}")
