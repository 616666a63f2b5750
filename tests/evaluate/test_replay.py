"""Traces, what a replay's times say, how answers are ranked, and a server that fails in every way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from skvr_dist.commands import replay as command
from skvr_dist.data.prepare.corpus import Document
from skvr_dist.errors import UserError
from skvr_dist.evaluate.replay.client import Outcome, TokenScores, VllmServer, read_counters
from skvr_dist.evaluate.replay.compare import Comparison, compare, parting
from skvr_dist.evaluate.replay.figures import figures_of
from skvr_dist.evaluate.replay.play import Replayed, Settings, replay
from skvr_dist.evaluate.replay.report import ReplayReport, as_markdown, read_report
from skvr_dist.evaluate.replay.trace import Request, as_lines, poisson_arrivals, read_trace
from skvr_dist.evaluate.replay.workloads import Workload, code_assistant, support_desk, support_desk_chats
from skvr_dist.files import as_json
from skvr_dist.serve.server import last_error, split_options, vllm_server

MODULE = '''"""Boxes that are opened and shut."""

def opened(box, *, gently=True):
    """Open a box.

    It stays open until somebody shuts it, which nobody does by itself; a box that is open already stays as it is.
    """
    lid = box.lid
    lid.lift(gently)
    if lid.is_stuck():
        raise ValueError(box)
    return box


def _hidden(box):
    """Nobody asks about this."""
'''
DOCUMENTS = [Document("boxes.py", MODULE), Document("broken.py", "def (")]


def test_traces_are_what_they_were_made_as(tmp_path: Path) -> None:
    workload = Workload(requests=5, rate=2.0, characters=900, max_tokens=40, seed=3)
    trace = support_desk(DOCUMENTS, workload, validation_share=1.0, as_chat=True)
    assert trace == support_desk(DOCUMENTS, workload, validation_share=1.0, as_chat=True)
    assert trace != support_desk(DOCUMENTS, workload._replace(seed=4), validation_share=1.0, as_chat=True)
    for request in trace:
        system, user = (message["content"] for message in request.messages)
        assert "boxes.opened(box, *, gently=True)" in system and "boxes.opened" in user and "_hidden" not in system
        assert 10 <= request.max_tokens <= 40
    code = code_assistant(DOCUMENTS, workload._replace(characters=100), validation_share=1.0)
    assert all(request.prompt in MODULE and len(request.prompt) <= 100 for request in code)
    file = tmp_path / "trace.jsonl"
    file.write_text(as_lines([*trace, *code]))
    read = read_trace(file)
    assert read[0].place.startswith(f"{file}, line ")
    by_arrival = sorted([*trace, *code], key=lambda request: request.arrival)
    assert [replace(request, place="") for request in read] == by_arrival
    with pytest.raises(
        UserError, match=r"--requests 6 are more than the 5 that the documents held out at .* give; ask"
    ):
        support_desk(DOCUMENTS, workload._replace(requests=6), validation_share=1.0, as_chat=False)


def test_chats_to_train_are_about_what_the_trace_is_not() -> None:
    """Each document is either asked about in the trace or trained on; the answer is its documentation's beginning."""
    workload = Workload(requests=100, rate=1.0, characters=900, max_tokens=40, seed=3)
    documents = [Document(f"boxes{n}.py", MODULE.replace("Boxes that", f"Boxes {n} that")) for n in range(30)]
    chats = support_desk_chats(documents, workload, validation_share=0.5)
    asked = support_desk(documents, workload._replace(requests=5), validation_share=0.5, as_chat=True)
    assert len(chats) < 100  # 5 questions about each of the documents that are not held out

    def modules(texts: Iterable[str]) -> set[str]:
        return {text.split(".opened")[0].split()[-1] for text in texts}

    trained = modules(user["content"] for _, user, _ in chats)
    assert len(trained) * 5 == len(chats) and not trained & modules(r.messages[1]["content"] for r in asked)
    assert {answer["content"] for _, _, answer in chats} == {"Open a box."}
    assert [message["role"] for message in chats[0]] == ["system", "user", "assistant"]
    assert len(support_desk_chats(documents, workload._replace(requests=7), validation_share=0.5)) == 7
    with pytest.raises(UserError, match=r"of 0 questions about what --validation-share 1 does not hold out, none has"):
        support_desk_chats(documents, workload, validation_share=1.0)


def test_arrivals_are_those_of_independent_users() -> None:
    """Gaps have the mean and the deviation of an exponential distribution."""
    gaps = np.diff(poisson_arrivals(4000, 5.0, np.random.default_rng(0)))
    assert (
        gaps.min() >= 0 and gaps.mean() == pytest.approx(0.2, rel=0.05) and gaps.std() == pytest.approx(0.2, rel=0.08)
    )


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            "{",
            r"line 2 is no record of requests \(it is not JSON: .*\); expected arrival \(seconds, at least 0\), prompt",
        ),
        ('{"arrival": 1, "prompt": "a"}', r"line 2 is no record .* \(max_tokens: Field required\); expected arrival"),
        (
            '{"arrival": -1, "prompt": "a", "max_tokens": 1}',
            r"line 2 .* \(arrival: Input should be greater than or equal",
        ),
        ('{"arrival": 1, "max_tokens": 1}', r"line 2 .* \(has not one of prompt and messages\)"),
        ('{"arrival": 1, "prompt": "a", "max_tokens": 1, "temperature": 1}', r"line 2 .* \(temperature: Extra inputs"),
        ('{"arrival": 1, "messages": [{"content": "a"}], "max_tokens": 1}', r"line 2 .* \(a message has no role\)"),
    ],
)
def test_a_line_that_is_no_request_is_refused(line: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text('{"arrival": 0, "prompt": "a", "max_tokens": 1}\n' + line)
    with pytest.raises(UserError, match=shown):
        read_trace(tmp_path / "trace.jsonl")


def outcome(arrival: float, seconds: list[float], tokens: list[int], failure: str = "") -> Outcome:
    text = " ".join(map(str, tokens))
    return Outcome(arrival, arrival, seconds, tokens, text, "" if failure else "stop", failure)


def test_times_are_counted_from_arrivals_and_throughput_between_warm_up_and_drain() -> None:
    outcomes = [
        outcome(0.0, [0.5, 0.7, 0.9], [1, 2, 3]),
        outcome(4.0, [5.0, 5.1], [1, 2]),
        outcome(10.0, [12.0], [1]),
        outcome(6.0, [7.0], [1], failure="it took too long"),
    ]
    found = figures_of(Replayed("full", [], outcomes), warm_up=0.1)
    assert found.failed == 1 and found.failures == {"it took too long": 1} and found.tokens == 6
    assert found.first_token_median == pytest.approx(1.0) and found.first_token_p95 == pytest.approx(1.9)
    assert found.per_token_median == pytest.approx(0.15)
    assert found.steady_tokens_per_second == pytest.approx(3 / 9)  # of seconds 1 to 10, what broke off among it
    nothing = figures_of(Replayed("full", [], [outcome(0.0, [], [], "connection refused")]), warm_up=0.1)
    assert nothing.first_token_median is None and nothing.steady_tokens_per_second is None


def test_answers_rank_by_what_they_cost_and_not_by_their_texts(tmp_path: Path) -> None:
    """The first text changes from its first token, by a near-tie; in the second a late token is improbable."""
    requests = [
        Request(0.0, 8, prompt=name, name=name, place="t.jsonl, line 1") for name in ("tie", "error", "same", "failed")
    ]
    full = [
        outcome(0, [1, 1, 1], [1, 2, 3]),
        outcome(0, [1, 1, 1], [4, 5, 6]),
        outcome(0, [1], [7]),
        outcome(0, [], []),
    ]
    thin = [
        outcome(0, [1, 1], [9, 8]),
        outcome(0, [1, 1, 1], [4, 5, 0]),
        outcome(0, [1], [7]),
        outcome(0, [], [], "no"),
    ]
    words = ["a", "b", "c"]
    before = [TokenScores([-0.1] * 3, [1] * 3, words), TokenScores([-0.1] * 3, [1] * 3, words)]
    after = [TokenScores([-0.2, -0.1, -0.1], [2, 1, 1], words), TokenScores([-0.1, -0.1, -6.1], [1, 1, 40], words)]
    before += [TokenScores([-0.1], [1], ["a"])] * 2
    after += [TokenScores([-0.1], [1], ["a"])] * 2
    found = compare(
        requests,
        Replayed("full", [[0]] * 4, full, scores=[*before]),
        Replayed("thin", [[0]] * 4, thin, scores=[*after]),
    )
    assert [answer.name for answer in found.answers] == ["error", "tie", "same"]
    assert found.answers[0].cost == pytest.approx(2.0) and found.answers[0].worst_cost == pytest.approx(6.0)
    assert (found.answers[0].worst_token, found.answers[0].parts_at) == ("c", 2)
    assert found.mean_cost == pytest.approx(6.1 / 7) and found.agreement == pytest.approx(5 / 7) and found.same == 1
    assert parting([1, 2], [1, 2, 3]) == 2 and parting([], []) is None
    (tmp_path / "replay.json").write_text(as_json(report(found)))
    assert read_report(tmp_path / "replay.json") == report(found)
    page = as_markdown(report(found), cases=5)
    assert page.index("**error (t.jsonl, line 1)**") < page.index("**tie (") and "**same (" not in page


def report(comparison: Comparison) -> ReplayReport:
    full = figures_of(Replayed("full", [], [outcome(0, [1], [1])]), 0.1)
    return ReplayReport("t.jsonl", "m", 1, 0.0, False, [full], [comparison], "replay", None)


def test_counters_of_the_engine_are_read() -> None:
    page = """# HELP vllm:kv_cache_usage_perc KV-cache usage.
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:num_preemptions_total{engine="0",model_name="m"} 3.0
vllm:num_preemptions_total{engine="1",model_name="m"} 2.0
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100",sliding_window="None"} 1.0
python_info{version="3.11"} 1.0
"""
    assert read_counters(page) == {"kv_cache_usage_perc": 0.25, "num_preemptions_total": 5.0, "cache_tokens": 1600.0}


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def failing_server(complete: Handler, *, dies: bool = False) -> AsyncIterator[str]:
    """A server that knows no model, but how vLLM's addresses are called.

    Args:
        dies: after the warm-up.
    """

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "max_model_len": 16}]})

    async def tokenize(request: web.Request) -> web.Response:
        return web.json_response({"tokens": [1] * len((await request.json())["prompt"])})

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=503 if dies else 200)

    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.get("/health", health), web.get("/metrics", health)])
    app.add_routes([web.post("/tokenize", tokenize), web.post("/v1/completions", complete)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _answer(request: web.Request) -> web.StreamResponse:
    """As the prompt says."""
    prompt = (await request.json())["prompt"]
    if prompt == "refuse":
        return web.json_response({"error": {"message": "the engine is full"}}, status=503)
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"choices": [{"text": "a", "token_ids": [5]}]}\n\n')
    if prompt == "hang":
        await asyncio.sleep(10)
    if prompt == "error":
        await response.write(b'data: {"error": {"message": "out of blocks"}}\n\n')
    if prompt not in ("break", "error"):
        await response.write(b'data: {"choices": [{"text": "b", "token_ids": [6], "finish_reason": "stop"}]}\n\n')
        await response.write(b"data: [DONE]\n\n")
    return response


def test_requests_that_fail_are_counted_and_the_others_go_on() -> None:
    prompts = ("fine", "refuse", "break", "error", "hang", "late")
    requests = [Request(0.05 * number, 2, prompt=prompt) for number, prompt in enumerate(prompts)]

    async def run() -> Replayed:
        async with failing_server(_answer) as url:
            return await replay("full", url, requests, Settings(2.0, exactly=False, with_answers=False), None)

    found = asyncio.run(run())
    assert [each.failure for each in found.outcomes] == [
        "",
        "503: the engine is full",
        "the answer broke off",
        "out of blocks",
        "no whole answer in 2 seconds",
        "",
    ]
    late = found.outcomes[-1]  # sent when it arrived, while another one hung
    assert late.tokens == [5, 6] and late.text == "ab" and late.arrival <= late.token_seconds[0] < 2.0


@pytest.mark.parametrize(
    ("prompt", "dies", "shown"),
    [
        (
            "0123456789",
            False,
            r"^t.jsonl, line 1: a prompt of 10 tokens and 7 wanted are more than the 16 that .*; short",
        ),
        ("break", True, r"^the server of full at http://.* died after 0 of 1 answers; its log says why$"),
    ],
    ids=["too long", "dies"],
)
def test_what_ends_a_replay(prompt: str, dies: bool, shown: str) -> None:
    async def run() -> None:
        async with failing_server(_answer, dies=dies) as url:
            requests = [Request(0.0, 7, prompt=prompt, place="t.jsonl, line 1")]
            await replay("full", url, requests, Settings(1, exactly=False, with_answers=False), None)

    with pytest.raises(UserError, match=shown):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("closes", "dies", "shown"),
    [
        (False, True, r"^the server at http://\S+ has died \(500: the engine is dead\); its log says why$"),
        (True, True, r"^the server at http://\S+ has died \(Server disconnected\); its log says why$"),
        (True, False, r"^the server at http://\S+ lives, but gave no answer \(Server disconnected\); see its log$"),
        (False, False, r"gives no log probabilities of a prompt's tokens \(500: the engine is dead\), by which"),
    ],
)
def test_a_server_that_scores_no_answer(closes: bool, dies: bool, shown: str) -> None:
    async def complete(request: web.Request) -> web.Response:
        if closes and request.transport is not None:
            request.transport.close()
        return web.json_response({"error": {"message": "the engine is dead"}}, status=500)

    async def run() -> None:
        async with failing_server(complete, dies=dies) as url, VllmServer.at(url) as server:
            await server.scores([1], [2])

    with pytest.raises(UserError, match=shown):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("", r"a trace is replayed at servers of --model, or at those of --url; give one of both$"),
        ("--url full=http://127.0.0.1:9 --profiles half", r"^--profiles and --server-options are for servers that"),
        ("--url full=http://127.0.0.1:9 --max-cost 1 --no-answers", r"^--max-cost judges answers, which --no-answers"),
        ("--url full=http://127.0.0.1:9", r"^no server answers at http://127.0.0.1:9 \(connection refused\); start it"),
        ("--model EXPORT --profiles bulk", r"cannot read cache strategy 'bulk'; .* or a named profile \(half\)$"),
        ("--model absent", r"^--model absent is not an export .*; give the folder of one$"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    words: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 8, "kv_profiles": {"half": "every:2"}}))
    (tmp_path / "trace.jsonl").write_text('{"arrival": 0, "prompt": "a", "max_tokens": 1}\n')
    start = ["replay", "run", str(tmp_path / "trace.jsonl"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*start, *words.replace("EXPORT", str(tmp_path)).split()])
    with pytest.raises(UserError, match=shown):
        command.run()
    with pytest.raises(UserError, match=r"is no replay.json"):
        read_report(tmp_path / "trace.jsonl")


def test_an_error_that_names_another_one_is_not_the_cause(tmp_path: Path) -> None:
    """The end of what vLLM writes when its worker does not start."""
    log = tmp_path / "server.log"
    log.write_text(
        "(VllmWorker-0 pid=2) ERROR 11-26 19:42:54 [multiproc_executor.py:953] ValueError: Available memory is less\n"
        "(EngineCore pid=1) Exception: WorkerProc initialization failed. See stack trace for root cause.\n"
        "    raise RuntimeError(\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "ValueError: Available memory is less"
    log.write_text("")
    assert last_error(log) == "it printed nothing"


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """Here vLLM is not installed, which only its process finds out."""
    ended = r"^the server of full ended before it answered: .*(No module named 'vllm'|Error).*; see .*server.log$"
    with pytest.raises(UserError, match=ended), vllm_server(tmp_path / "absent", "full", tmp_path / "server.log"):
        pass
    with pytest.raises(
        UserError, match=r"^--hf-overrides={} is set for every server that is started here; leave it out"
    ):
        split_options("--dtype float32 --hf-overrides='{}'")
