"""How the tests are shared out when several processes run them (`make test`)."""

from __future__ import annotations

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it runs in the background ignore Ctrl-C, and the programs that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They start launchers, which would fight for ports and cores.
_ALONE = {"test_pretrain", "test_interruptions", "test_wheel"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module stays in one process, for the fixtures that its tests share."""
    for item in items:
        module = item.path.stem
        # The matrix is the longest module, and its layouts share nothing.
        group = item.name if module == "test_verify" else "launchers" if module in _ALONE else module
        item.add_marker(pytest.mark.xdist_group(group))
    # The longest first, so that no process ends up with them alone; with --no-loadscope-reorder the order is kept.
    items.sort(key=lambda item: item.path.stem not in _ALONE)
