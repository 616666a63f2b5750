"""What all commands share: how they read arguments, prove and write files, give a verdict, and end.

Exit codes, of every command:

  0  done                    70  a failure that nobody foresaw; the traceback is in the file that stderr names
  1  a figure was missed     75  start it again as it is
  2  put something right    130  Ctrl-C
                            141  the reader of its output has gone (`... | head -1`), as shells say it of SIGPIPE

Light to import: commands import torch and what builds on it inside their functions, so that --help and mistakes in
arguments are answered at once, and Ctrl-C during those imports ends with a sentence too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from skvr_dist.cluster.arguments import unpack
from skvr_dist.cluster.launcher import adopt_slurm_tasks, announced_rank, announced_world_size, is_other_rank
from skvr_dist.config.presets import find_configs
from skvr_dist.errors import EXIT_MISSED, EXIT_USAGE, OneRankError, RunInterrupted, UserError
from skvr_dist.files import as_json, full_disk, local_path, prove_writable, write_whole

EXIT_UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_CLOSED_PIPE = 141  # 128 + SIGPIPE

_LOCAL_RANK_OPTIONS = ("--local_rank=", "--local-rank=")
_SECONDS_FOR_THE_FIRST_RANK = 15.0
_MOST = 1e9
_WRITTEN = ("json", "output")
"""Options that name files to write."""


class Subcommand(Protocol):
    """A module that is one subcommand; its docstring is the help."""

    __doc__: str | None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, options: argparse.Namespace) -> int | None:
        """Run the subcommand; returns the exit code."""


def new_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it is written."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog or _program(), description=doc, formatter_class=formatter)


def _program() -> str:
    """Name of the program as the user started it; for a package (`python -m`) the package's name."""
    started = Path(sys.argv[0])
    return started.parent.name if started.name == "__main__.py" else started.name


def typed_command() -> str:
    """This command as it was typed, without the folders of the interpreter and of an installed command."""
    file = Path(sys.argv[0])
    start = ["python", f"{file.parent.name}/{file.name}"] if file.suffix == ".py" else [file.name]
    return shlex.join([*start, *sys.argv[1:]])


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None, *, over_ranks: bool = False
) -> argparse.Namespace:
    """Read a command line; options and other arguments may stand in any order.

    Drops the option that DeepSpeed's launcher passes to each rank, which has it in its environment too.

    Args:
        over_ranks: launchers start the command once per rank, and only rank 0 writes its files.

    Raises:
        UserError: the file of `--json` could not be written, or there is no configuration of the name given.
    """
    words = launcher_free(sys.argv[1:]) if words is None else words
    options = parser.parse_intermixed_args(words)
    if hasattr(options, "config"):
        default = [] if options.default_config is None else [options.default_config]
        options.config = find_configs(options.config or default)
    if getattr(options, "json", None) is not None:  # empty is a mistake too
        is_written = not over_ranks or announced_world_size() == 1 or announced_rank() == 0
        options.json = prove_writable(options.json) if is_written else Path(options.json)
    _require_unread(options)
    return options


def _require_unread(options: argparse.Namespace) -> None:
    """Refuse to write over a file that the command is to read.

    Raises:
        UserError: the file of `--json` or `--output` is named by another argument, too.
    """
    values = [value for name, value in vars(options).items() if name not in _WRITTEN]
    words = [word for value in values for word in (value if isinstance(value, list | tuple) else [value])]
    for name in _WRITTEN:
        written = Path(getattr(options, name, None) or ".")
        for word in words if written.is_file() else []:
            if isinstance(word, str | Path) and _names(str(word), written):
                raise UserError(f"--{name} {written} is what {word} names, too, and would be lost; name another file")


def _names(word: str, file: Path) -> bool:
    """Whether a word of the command line, or its part after `=`, is a path of an existing file."""
    for text in (word, word.partition("=")[2]):
        if "." in text or "/" in text:  # else it is a name, of a matrix say
            with contextlib.suppress(OSError, ValueError, UserError):
                if file.samefile(local_path(text)):
                    return True
    return False


def launcher_free(words: Sequence[str]) -> list[str]:
    """A command line without what the launcher has added to it, as it was before it was packed (`pack`)."""
    return [word for word in unpack(words) if not word.startswith(_LOCAL_RANK_OPTIONS)]


def run_subcommand(
    doc: str | None, subcommands: Mapping[str, Subcommand], *, over_ranks: Collection[str] = ()
) -> int | None:
    """Read the name of a subcommand, then its arguments, and run it.

    Args:
        over_ranks: names of those that launchers start once per rank.
    """
    words = launcher_free(sys.argv[1:])
    top = new_parser(doc)
    width = max(map(len, subcommands)) + 2
    lines = [f"{name:<{width}}{(module.__doc__ or '').splitlines()[0]}" for name, module in subcommands.items()]
    top.epilog = "subcommands (each has a --help of its own):\n  " + "\n  ".join(lines)
    top.add_argument("subcommand", choices=subcommands, metavar="{" + ",".join(subcommands) + "}")
    name = top.parse_args(words[:1]).subcommand
    own = new_parser(subcommands[name].__doc__, f"{top.prog} {name}")
    subcommands[name].add_arguments(own)
    return subcommands[name].run(parse(own, words[1:], over_ranks=name in over_ranks))


def add_json(parser: argparse.ArgumentParser, what: str = "write the figures there too") -> None:
    """Add `--json FILE`, which `parse` proves writable before any work begins."""
    parser.add_argument("--json", metavar="FILE", help=what)


def add_bound(parser: argparse.ArgumentParser, default: float, what: str, name: str = "--bound") -> None:
    """Add the option for the bound that decides between exit code 0 and 1."""
    parser.add_argument(name, type=finite, default=default, metavar="X", help=f"{what} (default: {default})")


def add_configs(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--config`, whose names `parse` turns into paths; required unless there is a default."""
    shown = "" if default is None else f" (default: {default})"
    parser.add_argument(
        "--config",
        action="append",
        required=default is None,
        metavar="FILE",
        help=f"a YAML file or a preset's name; repeated, later ones win{shown}",
    )
    parser.set_defaults(default_config=default)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments that override keys of the configuration."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key; value in YAML")


def finite(text: str) -> float:
    """An argparse type: a number, neither infinite nor NaN, which no figure would be compared with."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def at_least(minimum: int, most: int = 10**6) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` to `most`."""

    def count(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{number} is less than {minimum}, the fewest that make sense")
        if number > most:
            raise argparse.ArgumentTypeError(f"{number} is more than {most}, the most that make sense")
        return number

    return count


def at_least_zero(text: str) -> float:
    """An argparse type: a number from 0 to a billion."""
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return _within(number)


def positive(text: str) -> float:
    """An argparse type: a number above 0, at most a billion."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (number > 0 and math.isfinite(number)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return _within(number)


def _within(number: float) -> float:
    """Refuse what is no quantity: products of it would overflow."""
    if number > _MOST:
        raise argparse.ArgumentTypeError(f"{number:g} is more than {_MOST:g}, the most that makes sense")
    return number


def share(text: str) -> float:
    """An argparse type: a number above 0, at most 1."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1, which is all")
    return number


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no probability; give a number from 0 to 1")
    return number


def a_path(text: str) -> Path:
    """An argparse type: a path of this machine, `~` replaced by the home folder; no URL."""
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def usable_device(name: str | None) -> str:
    """The device that `--device` names, or by default a GPU if there is one.

    Raises:
        UserError: this build or this machine has no such device.
    """
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of a build without CUDA
        raise UserError(f"--device {device} is not to be had here ({str(error).splitlines()[0]}); use cpu") from None
    return device


def write_json(file: Path, record: Any) -> None:
    """Write figures as JSON, as `skvr_dist.files.as_json` makes it.

    Raises:
        UserError: the file cannot be written.
    """
    write_whole(file, as_json(record, indent=2) + "\n")


@dataclass(frozen=True)
class Figure:
    """A measured figure and its bound; NaN meets none."""

    what: str
    """The figure in words, its value included."""
    bound: str
    met: bool

    @property
    def verdict(self) -> str:
        """The figure against its bound, in a word."""
        return "met" if self.met else "missed"

    def __str__(self) -> str:
        return f"{self.what}; bound {self.bound}: {self.verdict}"


def conclude(figures: Sequence[Figure], *, table: str, record: Any, json_file: Path | None) -> int:
    """Print a table, then a line per figure; write the record; returns the exit code."""
    print(table + "\n")
    for figure in figures:
        print(figure)
    if json_file is not None:
        write_json(json_file, record)
    return exit_code_of(figures)


def exit_code_of(figures: Sequence[Figure]) -> int:
    """0 if every figure meets its bound."""
    return 0 if all(figure.met for figure in figures) else EXIT_MISSED


def run_command(main: Callable[[], int | None], *, over_ranks: bool = False) -> NoReturn:
    """Run a command and end the process: what goes wrong becomes one sentence on stderr and an exit code.

    Args:
        main: reads `sys.argv`; returns the exit code, None for 0.
        over_ranks: launchers start it once per rank, and all ranks meet the same mistake until they join their
            process group: then the first rank of each host says it, and its launcher ends the others.
    """
    if callable(signal.getsignal(signal.SIGINT)):  # a shell has what it runs in the background ignore it
        signal.signal(signal.SIGINT, _interrupt)
    threading.excepthook = _keep_traceback_of_thread
    if over_ranks:  # torch's C++ would warn of a closed connection with a stack of thirty lines; our sentence names it
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by who started this
            setattr(sys, stream, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of a file need not be text, a terminal not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            if over_ranks:
                adopt_slurm_tasks()
            code = main() or 0
        finally:
            _flush_stdout()
    except SystemExit:  # argparse has said what there is to say
        raise
    except BaseException as error:
        _clear_bars()
        code, sentence = _ending_of(error)
        one_rank = isinstance(error, OneRankError | RunInterrupted) or code == EXIT_UNFORESEEN
        if sentence and not one_rank and over_ranks and _said_by_another_rank():
            # A launcher ends all ranks as soon as one has ended: that must be the one that says why. If this one still
            # lives after that, it has met something of its own.
            time.sleep(_SECONDS_FOR_THE_FIRST_RANK)
        if sentence:
            with suppress(OSError):  # nobody may be reading stderr either
                if code == EXIT_INTERRUPTED and sys.stderr.isatty():  # which shows ^C
                    print(file=sys.stderr)
                print(f"error: {sentence}", file=sys.stderr, flush=True)
        _leave_stdout()
    sys.exit(code)


_interrupted = threading.Event()
"""Whether Ctrl-C has come."""


def _interrupt(_: int, __: object) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def _clear_bars() -> None:
    """Take the progress bars that an error has left off the terminal, those of other packages among them."""
    bars: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        with suppress(Exception):  # the terminal may have gone
            bar.leave = False
            bar.close()


def _keep_traceback_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Keep the traceback of what ended a thread. Whoever waits for the thread says what it means."""
    if failed.exc_value is not None and failed.exc_type is not SystemExit:
        _keep_traceback(failed.exc_value, f"{failed.thread.name if failed.thread else 'a thread'} ends")


def _ending_of(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence for the error that ended a command; no sentence where nobody would read it."""
    name = _program()
    # An import that Ctrl-C has cut short fails with something else where somebody catches everything.
    if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
        return EXIT_INTERRUPTED, f"{name} was interrupted (Ctrl-C) before it was through"
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        return EXIT_CLOSED_PIPE, ""
    if reason := full_disk(error):
        file = getattr(error, "filename", None) or "the standard output, or a file that the system did not name"
        return EXIT_USAGE, f"cannot write {file}: {reason}; make room, or write to another disk"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return EXIT_USAGE, f"{name} cannot use {os.fsdecode(error.filename)}: {error.strerror}; put it in order"
    text = " ".join(str(error).split())
    # PyTorch has a type of its own for GPUs, and a text for the host.
    no_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if no_memory or "can't allocate memory" in text or "not enough memory" in text:
        asked = f": {text}" if text else ""
        return EXIT_USAGE, f"{name} ran out of memory{asked}; give it more, or less to hold at a time"
    culprit = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return EXIT_UNFORESEEN, f"{name} met what nobody foresaw, {culprit}; {_keep_traceback(error)}"


def _keep_traceback(error: BaseException, what_ends: str = "the run ends") -> str:
    """Write the traceback to the run's log, or to a temporary file; returns where it is, in words."""
    logger = logging.getLogger("skvr_dist")
    logs = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    if logs:
        logger.error(what_ends, exc_info=error)
        return f"the traceback is in {logs[0].baseFilename}"
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, file = tempfile.mkstemp(prefix=f"{Path(_program()).stem}-", suffix=".traceback", text=True)
        os.close(descriptor)
        Path(file).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as failure:
        return f"no file could take the traceback ({failure}):\n{text}"
    return f"the traceback is in {file}"


def _flush_stdout() -> None:
    """Flush stdout, so that a closed pipe or a full disk is met here, not when the interpreter ends."""
    if sys.stdout is not None and not sys.stdout.closed:
        try:
            sys.stdout.flush()
        except OSError as error:
            error.filename = error.filename or "the standard output"
            raise


def _leave_stdout() -> None:
    """Point a stdout that takes nothing at /dev/null: the interpreter would try again at its end, and complain."""
    try:
        _flush_stdout()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _reader_has_gone() -> bool:
    """Whether it is the standard output whose pipe is broken, not a connection of the command's own."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no descriptor
        return False


def _said_by_another_rank() -> bool:
    """Whether the first rank of this host prints the same. One variable left in the environment makes no rank."""
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_initialized()
    return not joined and is_other_rank()
