"""A vLLM server over HTTP: tokens of prompts, answers as they come, log probabilities, counters."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from skvr_dist.errors import UserError
from skvr_dist.evaluate.replay.trace import Request

_LONGEST_EVENT = 1 << 24
"""Bytes of a line of a stream; the first one repeats the tokens of the prompt."""
_SECONDS_TO_CONNECT = 10.0


@dataclass
class Outcome:
    """What came of a request; seconds after the beginning of the replay."""

    arrival: float
    sent: float = 0.0
    token_seconds: list[float] = field(default_factory=list)
    """When each token came."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    failure: str = ""
    """Why it failed, in words; empty if it did not."""


class TokenScores(NamedTuple):
    """What a model thinks of each token of an answer that it is given."""

    log_probs: list[float]
    ranks: list[int]
    """1 where greedy decoding would have chosen the token, after the same tokens before it."""
    texts: list[str]
    """Of the tokens."""


class VllmServer:
    """A server that answers.

    Args:
        session: without a limit on connections, because arrivals do not wait for each other.
        model: the name that it serves the model by.
        longest: tokens of prompt and answer together.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, longest: int) -> None:
        self._session = session
        self.url = url
        self._model = model
        self.longest = longest

    @staticmethod
    @asynccontextmanager
    async def at(url: str) -> AsyncIterator[VllmServer]:
        """The server at an address such as http://127.0.0.1:8000.

        Raises:
            UserError: nothing answers there, or not as vLLM does.
        """
        timeout = aiohttp.ClientTimeout(total=None, connect=_SECONDS_TO_CONNECT)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, read_bufsize=_LONGEST_EVENT, trust_env=False
        ) as session:
            try:
                async with session.get(f"{url}/v1/models") as response:
                    served = (await response.json())["data"][0]
                    model, longest = str(served["id"]), int(served["max_model_len"])
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise UserError(f"no server answers at {url} ({_reason(error)}); start it, or correct --url") from None
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(
                    f"what answers at {url} is no vLLM server: its /v1/models names no model and max_model_len; "
                    f"give the address of one, without /v1"
                ) from None
            yield VllmServer(session, url, model, longest)

    async def is_alive(self) -> bool:
        """Whether it can still answer."""
        try:
            async with self._session.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def prompt_tokens(self, request: Request) -> list[int]:
        """The tokens that the server reads for a request, chat template included.

        Raises:
            UserError: it cannot read the request, or has died.
        """
        read = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
        try:
            return list((await self._post("/tokenize", read))["tokens"])
        except _FAILURES as error:
            await self._raise_if_gone(error)
            raise UserError(f"{request.place}: the server at {self.url} cannot read it ({error}); correct it") from None

    async def answer(self, request: Request, outcome: Outcome, clock: Callable[[], float], *, exactly: bool) -> None:
        """Have a request answered, greedily, and note in `outcome` what comes and when, or why it failed.

        Args:
            exactly: continue to the tokens wanted, beyond where the model would end.
        """
        body: dict[str, Any] = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
        body |= {"model": self._model, "max_tokens": request.max_tokens, "temperature": 0, "stream": True}
        body |= {"ignore_eos": exactly, "return_token_ids": True}
        outcome.sent = clock()
        try:
            async with self._session.post(self.url + _path_of(request), json=body) as response:
                await _raise_if_refused(response)
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        _note(json.loads(line.removeprefix(b"data: ")), outcome, clock())
            if not outcome.finish_reason:
                outcome.failure = "the answer broke off"
        except _FAILURES as error:
            outcome.failure = _reason(error)

    async def scores(self, prompt: Sequence[int], answer: Sequence[int]) -> TokenScores:
        """What the model thinks of an answer after a prompt. An answer that fills the context loses its last token.

        Raises:
            UserError: the server gives no log probabilities of prompts, or has died.
        """
        tokens = [*prompt, *answer][: self.longest - 1]
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        try:
            choice = (await self._post("/v1/completions", body))["choices"][0]
        except _FAILURES as error:
            await self._raise_if_gone(error)
            raise UserError(
                f"the server at {self.url} gives no log probabilities of a prompt's tokens ({error}), by which answers "
                f"are compared; start it without --kv-sharing-fast-prefill, or compare nothing with --no-answers"
            ) from None
        found = [each[str(token)] for token, each in zip(tokens, choice["prompt_logprobs"], strict=True) if each]
        found = found[len(prompt) - 1 :]  # the first token has none
        columns = ([each[name] for each in found] for name in ("logprob", "rank", "decoded_token"))
        return TokenScores(*columns)

    async def counters(self) -> dict[str, float]:
        """The engine's own counters by name, without `vllm:`, summed over engines; none where it cannot answer."""
        try:
            async with self._session.get(f"{self.url}/metrics") as response:
                return read_counters(await response.text())
        except (aiohttp.ClientError, TimeoutError, OSError):
            return {}

    async def _raise_if_gone(self, error: Exception) -> None:
        """After a request that failed: raises `UserError` if the server has died, or gave no answer at all."""
        if not await self.is_alive():
            raise UserError(f"the server at {self.url} has died ({_reason(error)}); its log says why") from None
        if not isinstance(error, _RefusedError):
            raise UserError(
                f"the server at {self.url} lives, but gave no answer ({_reason(error)}); see its log"
            ) from None

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        async with self._session.post(self.url + path, json={"model": self._model, **body}) as response:
            await _raise_if_refused(response)
            return await response.json()


class _RefusedError(Exception):
    """The server answered with an error; the message is its own."""


_FAILURES = (_RefusedError, aiohttp.ClientError, TimeoutError, OSError)
"""What a request can end with."""


def read_counters(page: str) -> dict[str, float]:
    """The values of Prometheus' text format; `cache_config_info` says in its labels how many tokens the cache holds."""
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^vllm:(\w+)(\{.*\})? (\S+)$", page, re.MULTILINE):
        if name == "cache_config_info":
            sizes = dict(re.findall(r'(\w+)="(\d+)"', labels))
            found["cache_tokens"] = float(sizes.get("num_gpu_blocks", 0)) * float(sizes.get("block_size", 0))
        else:
            found[name] = found.get(name, 0.0) + float(value)
    return found


def _path_of(request: Request) -> str:
    return "/v1/chat/completions" if request.messages else "/v1/completions"


async def _raise_if_refused(response: aiohttp.ClientResponse) -> None:
    if response.status >= 400:
        text = await response.text()
        try:
            record = json.loads(text)
            text = str(record.get("error", record).get("message", text))
        except (ValueError, AttributeError):
            pass
        raise _RefusedError(f"{response.status}: {' '.join(text.split())[:200]}")


def _note(event: dict[str, Any], outcome: Outcome, now: float) -> None:
    """Take an event of a stream."""
    if "error" in event:
        raise _RefusedError(str(event["error"].get("message", event["error"]))[:200])
    for choice in event.get("choices", ()):
        tokens = choice.get("token_ids") or []
        outcome.tokens += tokens
        outcome.token_seconds += [now] * len(tokens)
        outcome.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason


def _reason(error: BaseException) -> str:
    """Why a request failed, in a few words that are the same for the same reason."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "it took too long"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connection refused"
    return " ".join(str(error).split()) or type(error).__name__
