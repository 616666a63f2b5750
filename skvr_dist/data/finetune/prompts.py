"""Prompts without answers: a jsonl file of texts, or of chats with the tools that the assistant may call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from skvr_dist.data.finetune.chat import ChatTemplate
from skvr_dist.data.finetune.examples import ExampleError
from skvr_dist.data.finetune.formats import Part, parsed
from skvr_dist.data.prepare.formats import read_lines
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError

_KIND = "prompts"
_EXPECTED = "a text under the key prompt; or messages[] of {role, content}, and tools[] of {function: {name, ...}}"


class _Function(Part):
    name: str = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Tool(Part):
    function: _Function


class _Record(Part):
    prompt: str = ""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    tools: list[dict[str, Any]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> _Record:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("has not one of prompt and messages")
        if self.tools and not self.messages:
            raise ValueError("has tools, but no messages")
        if any(not isinstance(message.get("role"), str) for message in self.messages):
            raise ValueError("a message has no role")
        return self


@dataclass(frozen=True)
class Prompt:
    """What is read before an output."""

    text: str
    """For people: a text, or what was said last."""
    tokens: list[int]
    place: str
    """Where it is from, for messages."""
    tools: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The schema of the arguments of each tool that may be called, by its name."""


def read_prompts(path: Path, tokenizer: Tokenizer, template_folder: str) -> Iterator[Prompt]:
    """The prompts of a file in its order.

    Args:
        template_folder: where the chat template is that chats are written with.

    Raises:
        UserError: the file cannot be read, a record does not fit, or there is no chat template for one.
    """
    template: ChatTemplate | None = None
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ExampleError(place, f"record of {_KIND}", f"it is not JSON: {error}", _EXPECTED) from None
        record = parsed(_Record, value, place, _KIND, _EXPECTED)
        tools = [parsed(_Tool, tool, place, _KIND, _EXPECTED).function for tool in record.tools]
        schemas = {tool.name: tool.parameters for tool in tools}
        if record.prompt:
            yield Prompt(record.prompt, tokenizer.encode(record.prompt), place)
            continue
        template = template or ChatTemplate.of(template_folder, tokenizer, is_model=True)
        tokens = template.ask(record.messages, record.tools, place)
        yield Prompt(str(record.messages[-1].get("content") or ""), tokens, place, schemas)


def require_room(prompts: list[Prompt], longest: int, new_tokens: int) -> None:
    """Refuse prompts that leave no room for what is to be decoded after them.

    Args:
        longest: tokens that the model can read.
    """
    for prompt in prompts:
        if len(prompt.tokens) + new_tokens > longest:
            raise UserError(
                f"{prompt.place}: {len(prompt.tokens)} tokens and {new_tokens} new ones are more than the model's "
                f"{longest}; remove it, or give a smaller --decode"
            )
