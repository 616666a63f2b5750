"""Replaying a trace: requests are sent when they arrive, however many are still being answered (an open loop)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tqdm import tqdm

from skvr_dist.errors import UserError
from skvr_dist.evaluate.replay.client import Outcome, TokenScores, VllmServer
from skvr_dist.evaluate.replay.trace import Request

_SECONDS_BETWEEN_COUNTERS = 0.5
_SCORED_AT_ONCE = 4
"""Answers; log probabilities of long prompts take memory on the server."""
_PEAKS = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
"""Counters of which the largest value counts."""
_SINCE = ("num_preemptions_total", "prefix_cache_hits_total", "prefix_cache_queries_total")
"""Counters that go up, and of which the difference counts."""
_WARM_UP = Request(arrival=0.0, prompt="Hello", max_tokens=8)


@dataclass(frozen=True)
class Settings:
    """How a trace is replayed."""

    timeout: float
    """Seconds, after which a request has failed."""
    exactly: bool
    """Every answer has the tokens wanted, beyond where the model would end it."""
    with_answers: bool
    """Score the answers of the first profile."""


@dataclass
class Replayed:
    """A trace at one profile."""

    profile: str
    prompts: list[list[int]]
    """Tokens of each request's prompt."""
    outcomes: list[Outcome]
    counters: dict[str, float] = field(default_factory=dict)
    """The engine's own: the largest seen of `_PEAKS`, the rise of `_SINCE`, and cache_tokens."""
    scores: list[TokenScores | None] = field(default_factory=list)
    """What this profile thinks of each answer of the first one; None where there is no answer."""


async def replay(
    profile: str, url: str, requests: Sequence[Request], settings: Settings, first: Replayed | None
) -> Replayed:
    """Replay a trace against a server, then have it score the answers of the first profile.

    Args:
        first: the profile that answers are compared with; None if it is this one.

    Raises:
        UserError: the server is dead or dies, or cannot hold a request.
    """
    async with VllmServer.at(url) as server:
        prompts = await read_prompts(server, requests)
        if first is not None and prompts != first.prompts:
            raise UserError(
                f"the servers of {first.profile} and {profile} read the trace as other tokens; give servers of one "
                f"model"
            )
        warm_up = Outcome(0.0)
        await server.answer(_WARM_UP, warm_up, time.monotonic, exactly=False)
        if warm_up.failure:
            raise UserError(f"the server of {profile} at {url} answers nothing ({warm_up.failure}); its log says why")
        async with _counted(server) as counters:
            outcomes = await _play(server, profile, requests, settings)
        if not await server.is_alive():
            answered = sum(not each.failure for each in outcomes)
            raise UserError(
                f"the server of {profile} at {url} died after {answered} of {len(requests)} answers; its log says why"
            )
        found = Replayed(profile, prompts, outcomes, counters)
        if settings.with_answers:
            found.scores = await _scored(server, profile, prompts, (first or found).outcomes)
        return found


async def read_prompts(server: VllmServer, requests: Sequence[Request]) -> list[list[int]]:
    """The tokens of each request.

    Raises:
        UserError: the server cannot read a request, or it leaves no room for the tokens wanted.
    """
    prompts = []
    for request in requests:
        prompts.append(await server.prompt_tokens(request))
        if len(prompts[-1]) + request.max_tokens > server.longest:
            raise UserError(
                f"{request.place}: a prompt of {len(prompts[-1]):,} tokens and {request.max_tokens} wanted are more "
                f"than the {server.longest:,} that the server at {server.url} reads; shorten the prompt, or serve with "
                f"a larger --max-model-len"
            )
    return prompts


async def _play(server: VllmServer, profile: str, requests: Sequence[Request], settings: Settings) -> list[Outcome]:
    """Send every request when it arrives; returns when all are answered or have failed."""
    began = time.monotonic()

    def clock() -> float:
        return time.monotonic() - began

    async def ask(request: Request) -> Outcome:
        outcome = Outcome(request.arrival)
        await asyncio.sleep(max(0.0, request.arrival - clock()))
        try:
            async with asyncio.timeout(settings.timeout):
                await server.answer(request, outcome, clock, exactly=settings.exactly)
        except TimeoutError:
            outcome.failure = f"no whole answer in {settings.timeout:g} seconds"
        bar.update()
        return outcome

    with tqdm(total=len(requests), desc=f"requests at {profile}", disable=None) as bar:
        return list(await asyncio.gather(*map(ask, requests)))


@asynccontextmanager
async def _counted(server: VllmServer) -> AsyncIterator[dict[str, float]]:
    """Watch the engine's counters; what is yielded is filled at the end."""
    found: dict[str, float] = {}
    before = await server.counters()

    async def watch() -> None:
        while True:
            now = await server.counters()
            found.update({name: max(found.get(name, 0.0), now[name]) for name in _PEAKS if name in now})
            await asyncio.sleep(_SECONDS_BETWEEN_COUNTERS)

    watching = asyncio.create_task(watch())
    try:
        yield found
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    after = await server.counters()
    found.update({name: after[name] - before.get(name, 0.0) for name in _SINCE if name in after})
    found.update({"cache_tokens": after["cache_tokens"]} if "cache_tokens" in after else {})


async def _scored(
    server: VllmServer, profile: str, prompts: Sequence[Sequence[int]], answers: Sequence[Outcome]
) -> list[TokenScores | None]:
    """What the server's model thinks of answers; None for those that failed or are empty."""
    at_once = asyncio.Semaphore(_SCORED_AT_ONCE)

    async def score(prompt: Sequence[int], answer: Outcome) -> TokenScores | None:
        async with at_once:
            found = None if answer.failure or not answer.tokens else await server.scores(prompt, answer.tokens)
        bar.update()
        return found

    with tqdm(total=len(prompts), desc=f"answers scored at {profile}", disable=None) as bar:
        return list(await asyncio.gather(*map(score, prompts, answers)))
