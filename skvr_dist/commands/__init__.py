"""Command lines over the library: a module each, with a `main` that a console command and a starter in the checkout's
`tools/` or `launch/` call. They import what is heavy inside their functions (`skvr_dist.command` says why).

Ctrl-C while the modules of a command are imported ends with a sentence as well, by a handler that is set here, before
all else; `run_command` sets its own.
"""

import os
import signal
import sys
import threading
from pathlib import Path


def _end_before_begin(number: int, _: object) -> None:
    sentence = f"error: {Path(sys.argv[0]).name} was interrupted (Ctrl-C) before it began\n"
    os.write(2, sentence.encode(errors="backslashreplace"))
    os._exit(128 + number)


if threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end_before_begin)
