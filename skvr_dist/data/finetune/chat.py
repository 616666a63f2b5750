"""Chats as text and tokens, by the chat template that a tokenizer brings.

A template writes a whole conversation as one text. Which parts of it are the assistant's is told by the template itself
(`{% generation %}`), or found from what it writes for the conversation's beginnings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from skvr_dist.data.finetune.examples import SAID_BESIDE, Chat
from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.hugging_face import HuggingFaceTokenizer, read_chat_template
from skvr_dist.errors import UserError

_FIXED_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro %}"
"""Before a template that writes today's date, so that a chat has the same tokens tomorrow: the day that Llama 3.1's
falls back to."""
_MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
"""Characters of a text: from the first to before the second."""
Tokens = tuple[NDArray[np.uint32], NDArray[np.bool_]]
"""Token ids [n], and which of them have loss [n]."""


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and any(message.get(key) for key in ("content", *SAID_BESIDE))


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        text: the template.
        special_tokens: what it may name, such as `bos_token`.
        tokenizer: of the run.
        name: where it came from, for messages.
    """

    text: str
    special_tokens: dict[str, str]
    tokenizer: HuggingFaceTokenizer
    name: str

    @classmethod
    def of(cls, path: str, tokenizer: Tokenizer, *, is_model: bool = False) -> ChatTemplate:
        """The template beside a tokenizer.

        Args:
            is_model: the path is that of a model to evaluate; else it is `data.tokenizer`.

        Raises:
            UserError: there is none.
        """
        found = read_chat_template(Path(path)) if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if found is None or not isinstance(tokenizer, HuggingFaceTokenizer):
            folder = "Hugging Face tokenizer with chat_template.jinja, or with a chat_template in tokenizer_config.json"
            way = f"give the folder of a {folder}"
            if is_model:  # a data set's own file of the tokenizer has none
                way = f"give an export of it by tools/export_hf.py with --tokenizer FOLDER, that of its {folder}"
            whose = "model" if is_model else "data.tokenizer"
            raise UserError(f"{whose} {path} has no chat template, which chats are written with; {way}")
        text, special_tokens = found
        return cls(_FIXED_DATE * ("strftime_now" in text) + text, special_tokens, tokenizer, path)

    def fit(self, chat: Chat, longest: int) -> Iterator[tuple[Tokens, bool]]:
        """A chat as tokens, and whether its last turns were left out to fit.

        One example, unless the template writes an earlier turn otherwise once a later one follows (as those do that
        drop thoughts): then one for each of the assistant's turns.

        Args:
            longest: tokens that an example may have.

        Raises:
            UserError: the template refuses the chat, or not even the assistant's first turn fits.
        """
        for key in SAID_BESIDE:
            if any(message.get(key) for message in chat.messages):
                self._require_place_for(key, chat.place)
        said = enumerate(chat.messages, start=1)
        ends = [number for number, message in said if _is_answer(message)]
        size = 0
        for kept in range(len(ends), 0, -1):
            found = self._whole(chat, ends[:kept])
            if found is None:
                break
            size = max(size, len(found[0]))
            if len(found[0]) <= longest and (found[1].any() or kept == len(ends)):
                self._require_learned(chat, found)
                yield found, kept < len(ends)
                return
        else:
            self._refuse(chat, size, longest)
        for end in ends[:kept]:
            turn = self._tokens(*self._last_turn(chat, end))
            if len(turn[0]) > longest:
                self._refuse(chat, len(turn[0]), longest)
            yield turn, kept < len(ends)

    def _require_learned(self, chat: Chat, whole: Tokens) -> None:
        if not whole[1].any():
            raise UserError(
                f"{chat.place}: the chat template of {self.name} marks no part of the chat with {{% generation %}}, so "
                f"nothing of it would be learned; mend the template"
            )

    def _refuse(self, chat: Chat, size: int, longest: int) -> NoReturn:
        raise UserError(
            f"{chat.place}: the chat up to one of the assistant's turns has {size - 1} tokens, more than "
            f"data.sequence_length {longest - 1}; raise the sequence length, or remove the chat"
        )

    def _whole(self, chat: Chat, ends: list[int]) -> Tokens | None:
        """The chat up to its last turn of the assistant, with loss on all its turns; None if it is not one text."""
        if _MARKS_TURNS.search(self.text):
            text, spans = self._render(chat, ends[-1], marked=True)
            return self._tokens(text, spans)
        turns = [self._last_turn(chat, end) for end in ends]
        text = turns[-1][0]
        for written, [(_, stop)] in turns[:-1]:
            if not text.startswith(written[:stop]):
                return None
        return self._tokens(text, [span for _, spans in turns for span in spans])

    def _last_turn(self, chat: Chat, end: int) -> tuple[str, list[Span]]:
        """The first `end` messages as a text, and where in it the last one of them is, as a model would write it."""
        text, marked = self._render(chat, end, marked=bool(_MARKS_TURNS.search(self.text)))
        if marked:
            return text, marked[-1:]
        before = self._asked(chat, end)
        if not text.startswith(before):
            raise UserError(
                f"{chat.place}: the chat template of {self.name} begins the assistant's message {end} otherwise when "
                f"it asks for it, so it cannot be told which part to learn; give a template that marks the "
                f"assistant's turns with {{% generation %}}"
            )
        return text, [(len(before), len(text.rstrip()))]

    def _asked(self, chat: Chat, end: int) -> str:
        """What is before message `end`, the assistant's, as the template asks for it."""
        try:
            return self._render(chat, end - 1, ask=True)[0]
        except UserError:
            if end > 1:
                raise
            raise UserError(
                f"{chat.place}: the chat begins with the assistant, whose turn the chat template of {self.name} cannot "
                f"ask for before any other; put a message before it, or give a template that marks the assistant's "
                f"turns with {{% generation %}}"
            ) from None

    def _render(self, chat: Chat, end: int, *, ask: bool = False, marked: bool = False) -> tuple[str, list[Span]]:
        """The first `end` messages as the template writes them, and the assistant's parts if it marks them.

        Args:
            ask: end with what asks the assistant for its turn.
        """
        text, spans = self._write(chat.messages[:end], chat.place, ask=ask, marked=marked, tools=chat.tools)
        return text, [tuple(span) for span in spans] if marked else []

    def ask(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], place: str) -> list[int]:
        """The tokens that ask the assistant for its turn after some messages.

        Args:
            tools: those that it may call, as functions of the OpenAI API.
            place: where they are from, for messages.

        Raises:
            UserError: the template refuses them, or has no place for tools.
        """
        text, _ = self._write(messages, place, ask=True, tools=tools)
        return self.tokenizer.encode_with_offsets(text)[0]

    def _require_place_for(self, key: str, place: str) -> None:
        """Raises `UserError` if the template never names what a chat has: it would be lost unseen."""
        if not re.search(rf"\b{key}\b", self.text):
            raise UserError(
                f"{place}: the chat template of {self.name} has no place for {key}; leave them out, or write them into "
                f"a content"
            )

    def _write(
        self,
        messages: Sequence[dict[str, Any]],
        place: str,
        *,
        ask: bool,
        marked: bool = False,
        tools: Sequence[dict[str, Any]] = (),
    ) -> tuple[str, Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if tools:
            self._require_place_for("tools", place)
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=self.text,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=marked,
                **self.special_tokens,
            )
        except Exception as error:  # a template may raise what it likes, with a sentence of its own
            raise UserError(
                f"{place}: the chat template of {self.name} refuses the chat ({' '.join(str(error).split())})"
            ) from None
        return texts[0], spans[0] if marked else []

    def _tokens(self, text: str, spans: list[Span]) -> Tokens:
        """Tokens of a text; those that end within a span have loss."""
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        ends: Any = np.array([stop for _, stop in offsets])
        predicted = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            predicted |= (start < ends) & (ends <= stop)
        predicted[:1] = False
        return np.array(ids, dtype=np.uint32), predicted
