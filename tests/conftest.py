"""How the tests are shared out when several processes run them (`make test`)."""

from __future__ import annotations

import contextlib
import signal

import pytest

with contextlib.suppress(ModuleNotFoundError):  # on machines with GPUs and beside vLLM
    from hypothesis import settings

    # How long an example takes depends on who shares the cores.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it runs in the background ignore Ctrl-C, and the programs that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They start launchers, which would fight for ports and cores.
_ALONE = {"test_pretrain", "test_interruptions", "test_wheel"}
# Long modules whose tests share little: the first what is compared, the second its servers.
_APART = {"test_verify", "test_vllm"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module stays in one process, for the fixtures that its tests share.

    First of all hooks: pytest-xdist reads the groups in its own, which would be before this one.
    """
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    # The longest first, so that no process ends up with them alone; with --no-loadscope-reorder the order is kept.
    items.sort(key=lambda item: _group(item) not in ("launchers", "servers", "test_tensor_parallel"))


def _group(item: pytest.Item) -> str:
    module = item.path.stem
    if module in _ALONE:
        return "launchers"
    if module not in _APART:
        return module
    if "servers" in getattr(item, "fixturenames", ()):
        return "servers"
    return "comparisons" if item.name.startswith("test_the_comparison_sees") else item.name
