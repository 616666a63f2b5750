"""Replay a trace at several cache strategies: speed, and the answers that change most.

    skvr-replay run trace.jsonl --model exports/planned --profiles full standard bulk --output runs/replay
    skvr-replay run trace.jsonl --url full=http://127.0.0.1:8000 bulk=http://127.0.0.1:8001 --output runs/replay

With --model a vLLM server is started for each profile in turn, full retention first; with --url they run already, one
for each profile. Requests are sent when they arrive, whatever is still being answered, and answered greedily. Prints a
table, and writes replay.md with the answers that change most from the first profile, side by side, and replay.json.

Answers are ranked by what the first profile's answer costs under the other: the mean difference of the log
probabilities of its tokens. Exit code 1: a profile misses --max-ttft-p95, --max-tpot-p95, --max-failed,
--min-throughput or --max-cost.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from skvr_dist.command import Figure, a_path, add_json, at_least, conclude, positive, share, typed_command
from skvr_dist.errors import UserError
from skvr_dist.files import as_json, prove_folder, write_whole

if TYPE_CHECKING:
    from skvr_dist.evaluate.replay.report import ReplayReport
    from skvr_dist.evaluate.replay.trace import Request

FULL = "full"


class Named(NamedTuple):
    """A profile and the server that runs at it."""

    profile: str
    url: str


def _named(text: str) -> Named:
    """An argparse type: PROFILE=URL."""
    profile, found, url = text.partition("=")
    if not profile or not found or not url.startswith(("http://", "https://")):
        raise ArgumentTypeError(f"{text!r} is not PROFILE=URL, such as full=http://127.0.0.1:8000")
    return Named(profile, url.rstrip("/").removesuffix("/v1"))


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("trace", type=a_path, metavar="TRACE", help="jsonl of requests (skvr-replay make --help)")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER", help="of replay.md and replay.json")
    parser.add_argument("--model", type=a_path, metavar="EXPORT", help="start a server of it for each profile")
    parser.add_argument(
        "--profiles", nargs="+", metavar="S", help="profiles or strategies (default: all of the export)"
    )
    parser.add_argument("--server-options", default="", metavar="...", help="further ones of vllm serve, after =")
    parser.add_argument("--url", nargs="+", type=_named, metavar="PROFILE=URL", help="servers that run already")
    parser.add_argument("--speed", type=positive, default=1.0, metavar="X", help="arrivals come X times as fast (1)")
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="then a request has failed (600)")
    parser.add_argument("--exact-tokens", action="store_true", help="answers go on to the tokens wanted")
    parser.add_argument("--warm-up", type=share, default=0.1, metavar="X", help="of the trace's time (default: 0.1)")
    parser.add_argument("--no-answers", action="store_true", help="measure speed alone")
    parser.add_argument("--cases", type=at_least(1), default=5, metavar="N", help="answers shown per profile (5)")
    bounds = parser.add_argument_group("bounds, for every profile")
    bounds.add_argument("--max-ttft-p95", type=positive, metavar="S", help="95 %% of first tokens come within")
    bounds.add_argument("--max-tpot-p95", type=positive, metavar="S", help="time per token of 95 %% of the answers")
    bounds.add_argument("--max-failed", type=at_least(0), metavar="N", help="requests")
    bounds.add_argument("--min-throughput", type=positive, metavar="X", help="steady tokens per second")
    bounds.add_argument("--max-cost", type=positive, metavar="NATS", help="per token of the first profile's answers")
    add_json(parser)


def run(options: Namespace) -> int:
    """Replay, and write what came of it; returns the exit code.

    Raises:
        UserError: a trace, a profile or a server cannot be used.
    """
    from skvr_dist.evaluate.replay.report import as_markdown, table_of
    from skvr_dist.evaluate.replay.trace import read_trace

    _require_consistent(options)
    requests = read_trace(options.trace)
    output = prove_folder(options.output)
    servers = list(_running(options) if options.url else _started(options, output))
    if options.max_cost is not None and len(servers) < 2:
        raise UserError("--max-cost compares answers with those of the first profile, which is alone; name another one")
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _end)
    report = _replay(options, requests, servers)
    write_whole(output / "replay.json", as_json(report, indent=2) + "\n")
    write_whole(output / "replay.md", as_markdown(report, options.cases))
    code = conclude(_figures(options, report), table=table_of(report), record=report, json_file=options.json)
    print(f"written: {output / 'replay.md'}")
    return code


def _require_consistent(options: Namespace) -> None:
    """Raises `UserError` if an option would have no effect."""
    if bool(options.model) == bool(options.url):
        raise UserError("a trace is replayed at servers of --model, or at those of --url; give one of both")
    if options.url and (options.profiles or options.server_options):
        raise UserError(
            "--profiles and --server-options are for servers that --model starts; leave them out with --url"
        )
    if options.max_cost is not None and options.no_answers:
        raise UserError("--max-cost judges answers, which --no-answers leaves out; give one of both")


def _end(_: int, __: object) -> NoReturn:
    """SIGTERM ends the servers too."""
    sys.exit(128 + signal.SIGTERM)


Server = tuple[str, AbstractContextManager[str]]
"""A profile, and what yields the address of its server."""


def _running(options: Namespace) -> Iterator[Server]:
    """The servers of --url, each of which answers."""
    from skvr_dist.evaluate.replay.client import VllmServer

    async def require_answer(url: str) -> None:
        async with VllmServer.at(url):
            pass

    names = [named.profile for named in options.url]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--url names {twice} twice; name each profile once")
    for profile, url in options.url:
        asyncio.run(require_answer(url))
        yield profile, nullcontext(url)


def _started(options: Namespace, output: Path) -> Iterator[Server]:
    """Servers of the export, which start when they are entered; full retention is the first."""
    from skvr_dist.routing import CacheStrategy
    from skvr_dist.serve.server import require_vllm, split_options, vllm_server

    layers, profiles = _layers_and_profiles(options.model)
    strategies = CacheStrategy.parse_all([FULL, *(options.profiles or profiles)], layers, profiles)
    require_vllm()
    further = split_options(options.server_options)
    for profile in strategies:
        log = output / f"server-{profile.replace(':', '-').replace(',', '-')}.log"
        yield profile, vllm_server(options.model, profile, log, options=further)


def _layers_and_profiles(export: Path) -> tuple[int, dict[str, str]]:
    """Of an export's `config.json`."""
    try:
        config = json.loads((export / "config.json").read_text(encoding="utf-8"))
        return int(config["num_hidden_layers"]), dict(config.get("kv_profiles") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model {export} is not an export ({error}); give the folder of one") from None


def _replay(options: Namespace, requests: Sequence[Request], servers: Sequence[Server]) -> ReplayReport:
    """Replay at each profile in turn."""
    from skvr_dist.evaluate.replay.compare import compare
    from skvr_dist.evaluate.replay.figures import figures_of
    from skvr_dist.evaluate.replay.play import Replayed, Settings, replay
    from skvr_dist.evaluate.replay.report import ReplayReport
    from skvr_dist.sweep.results import source_commit

    requests = [replace(request, arrival=request.arrival / options.speed) for request in requests]
    settings = Settings(options.timeout, exactly=options.exact_tokens, with_answers=not options.no_answers)
    found: list[Replayed] = []
    for profile, server in servers:
        with server as url:
            found.append(asyncio.run(replay(profile, url, requests, settings, found[0] if found else None)))
    compared = [] if options.no_answers else [compare(requests, found[0], other) for other in found[1:]]
    return ReplayReport(
        trace=str(options.trace),
        model=str(options.model or ", ".join(url for _, url in options.url)),
        requests=len(requests),
        seconds=requests[-1].arrival,
        exact_tokens=options.exact_tokens,
        profiles=[figures_of(each, options.warm_up) for each in found],
        comparisons=compared,
        command=typed_command(),
        commit=source_commit(),
    )


def _figures(options: Namespace, report: ReplayReport) -> list[Figure]:
    """Every profile against the bounds that the user gave."""
    found = []
    for each in report.profiles:
        found += _at_most(
            options.max_ttft_p95, each.first_token_p95, f"{each.profile}: first tokens of 95 % within", "s"
        )
        found += _at_most(
            options.max_tpot_p95, each.per_token_p95, f"{each.profile}: per token, 95 % of answers within", "s"
        )
        found += _at_most(options.max_failed, each.failed, f"{each.profile}: failed requests:", "")
        if options.min_throughput is not None:
            speed = each.steady_tokens_per_second
            met = speed is not None and speed >= options.min_throughput
            shown = "n/a" if speed is None else f"{speed:,.1f}"
            found.append(
                Figure(f"{each.profile}: steady throughput {shown} tokens/s", f"{options.min_throughput:g}", met)
            )
    for comparison in report.comparisons:
        what = f"{comparison.profile}: cost of the answers per token:"
        found += _at_most(options.max_cost, comparison.mean_cost, what, "nats")
    return found


def _at_most(bound: float | None, value: float | None, what: str, unit: str) -> list[Figure]:
    """A figure, if there is a bound."""
    if bound is None:
        return []
    shown = "n/a" if value is None else f"{value:.4g}"
    return [Figure(f"{what} {shown} {unit}".rstrip(), f"{bound:g}", value is not None and value <= bound)]
