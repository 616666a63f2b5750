"""A vLLM server of an export at a cache strategy, as a process of its own that ends with its user."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from skvr_dist.cluster.launcher import free_port
from skvr_dist.errors import UserError

_OURS = ("--model", "--host", "--port", "--hf-overrides")
"""Options that this sets."""
_SECONDS_TO_END = 30.0
_SHOWN = 300
"""Characters of a log that an error shows."""
_AN_ERROR = re.compile(r"\w*(Error|Exception): .*")
_A_DEATH = re.compile(r"Worker proc \S+ died unexpectedly")
"""What vLLM logs of a worker that a signal ended, beside errors of all who waited for it."""


def require_vllm() -> None:
    """Raises `UserError` where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(
            "this starts vLLM, which is not installed here; `make serve-env` makes an environment with it, or start "
            "servers elsewhere and name them with --url"
        )


def split_options(text: str) -> list[str]:
    """Options for vLLM, as a shell splits them.

    Raises:
        UserError: a quote is not closed, or one is an option that the server is started with anyway.
    """
    try:
        options = shlex.split(text)
    except ValueError as error:
        raise UserError(f"cannot read the server's options {text!r} ({error}); close the quote") from None
    for option in options:
        if option.partition("=")[0] in _OURS:
            raise UserError(f"{option} is set for every server that is started here; leave it out of its options")
    return options


@contextmanager
def vllm_server(
    export: Path, profile: str, log: Path, *, options: Sequence[str] = (), seconds: float = 900.0
) -> Iterator[str]:
    """Start a server, yield its address when it answers, and end it.

    Args:
        export: with the code of this package installed beside vLLM.
        profile: a profile of the export or a cache strategy.
        log: the file for what the server prints.
        options: further ones of `vllm serve`.
        seconds: that it has to start.

    Raises:
        UserError: it ended before it answered, or did not answer in time. Where a worker of it has died, what its user
            raises tells of that too.
    """
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--hf-overrides", json.dumps({"kv_profile": profile})]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while not _answers(url):
            if process.poll() is not None:
                raise UserError(f"the server of {profile} ended before it answered: {last_error(log)}; see {log}")
            if time.monotonic() > deadline:
                raise UserError(f"the server of {profile} did not answer in {seconds:g} seconds; see {log}")
            time.sleep(0.5)
        yield url
    except UserError as error:
        if (death := _A_DEATH.search(log.read_text(errors="replace"))) is None:
            raise
        raise UserError(
            f"{error}; {log} says: {death.group()}. Look there and for a lack of memory; PYTHONFAULTHANDLER=1 has it "
            f"show where, and docs/choosing-a-cache.md tells of a CPU on which --dtype float32 helped"
        ) from None
    finally:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def last_error(log: Path) -> str:
    """The last error that a log names; not one that says that another one is the cause."""
    lines = log.read_text(errors="replace").splitlines() or ["it printed nothing"]
    named = [found.group() for line in lines if (found := _AN_ERROR.search(line))]
    causes = [error for error in named if "root cause" not in error]
    return (causes or named or lines)[-1].strip()[:_SHOWN]
