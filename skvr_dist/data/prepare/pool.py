"""Tasks over all cores, with one progress bar, stopped at once when one of them fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from skvr_dist.data.cores import available_cores
from skvr_dist.data.prepare.formats import Advance
from skvr_dist.errors import UserError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_REFRESH_SECONDS = 0.5
_REPORT_BYTES = 2**18  # a process reports its progress, and looks whether it is to stop, this often


def run_tasks(
    function: Callable[[int, _Task, Advance], _Result],
    tasks: Mapping[int, _Task],
    *,
    total_bytes: int,
    workers: int | None,
) -> dict[int, _Result]:
    """`function(number, task, advance)` for every task; the results by number.

    Args:
        function: picklable; calls `advance(n)` after every n bytes of its work.
        total_bytes: bytes of all tasks, for the bar.
        workers: processes; None takes every core this one may run on.

    Raises:
        UserError: a process was killed; and whatever the function raises.
    """
    results: dict[int, _Result] = {}
    if not tasks:
        return results
    context = multiprocessing.get_context()
    done, stop = context.Value("q", 0), context.Event()
    size = min(workers or available_cores(), len(tasks))
    with (
        tqdm(total=total_bytes, unit="B", unit_scale=True, leave=False, disable=None) as bar,
        ProcessPoolExecutor(size, context, _start_process, (function, done, stop)) as pool,
    ):
        try:
            numbers: dict[Future[_Result], int] = {pool.submit(_run, *task): task[0] for task in tasks.items()}
            pending = set(numbers)
            while pending:
                finished, pending = wait(pending, _REFRESH_SECONDS, return_when=FIRST_EXCEPTION)
                bar.update(done.value - bar.n)
                results |= {numbers[future]: future.result() for future in finished}
        except BrokenProcessPool:
            raise UserError(
                "a process was killed, for want of memory perhaps; the same command continues, --workers 1 takes least"
            ) from None
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return results


class _StoppedError(Exception):
    """Another task failed."""


_function: Callable[..., Any]
_done: Any
_stop: Any


def _start_process(function: Callable[..., Any], done: Any, stop: Any) -> None:
    global _function, _done, _stop
    _function, _done, _stop = function, done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and says when to stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(number: int, task: Any) -> Any:
    unreported = 0

    def advance(count: int, *, flush: bool = False) -> None:
        nonlocal unreported
        unreported += count
        if flush or unreported >= _REPORT_BYTES:
            with _done.get_lock():
                _done.value += unreported
            unreported = 0
            if _stop.is_set():
                raise _StoppedError

    result = _function(number, task, advance)
    advance(0, flush=True)
    return result
