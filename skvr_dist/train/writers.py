"""Who takes the records of a run's metrics: the writers that `metrics.writers` lists, on rank 0.

A run of days does not end because one of them fails: it is named once, with its error, and left out from then on. At
the start of a run it is refused instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, Protocol

import yaml
from torch.utils.tensorboard import SummaryWriter

from skvr_dist.config.metrics import WRITERS, MetricsConfig
from skvr_dist.errors import UserError
from skvr_dist.files import append_line, as_json, naming_failure, write_whole
from skvr_dist.run.folder import RunFolder

Values = dict[str, float]
"""A record: numbers by tag."""


class Writer(Protocol):
    """Takes records in the order of their steps."""

    def write(self, step: int, values: Values) -> None:
        """Take the record of a step, or of an evaluation after it."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class JsonLines:
    """metrics.jsonl of the run's folder."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        self._file = folder.metrics
        # Without the records of steps that a resumed run does again.
        kept = [record for record in folder.metric_records() if record["step"] <= first_step]
        write_whole(self._file, "".join(as_json(record) + "\n" for record in kept))

    def write(self, step: int, values: Values) -> None:
        """Add a line; it is with the system when this returns."""
        append_line(self._file, as_json({"step": step, **values}))

    def close(self) -> None:
        """Nothing is left to do."""


class TensorBoard:
    """Scalars in tensorboard/ of the run's folder."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        self._folder = folder.tensorboard
        with naming_failure(self._folder):
            self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def write(self, step: int, values: Values) -> None:
        """Hand the scalars to the thread that writes them."""
        with naming_failure(self._folder):  # its thread has failed at an earlier value
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is left."""
        with naming_failure(self._folder):
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases with this run's id, so that a resumed one goes on in it.

    Its own variables say where: WANDB_MODE=offline writes to the run's folder alone.
    """

    def __init__(self, project: str, folder: RunFolder) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=project,
            id=folder.notes().get("id"),
            name=folder.path.name,
            dir=str(folder.path),
            resume="allow",
            config=yaml.safe_load(folder.config.read_text(encoding="utf-8")) if folder.config.exists() else None,
        )

    def write(self, step: int, values: Values) -> None:
        """Hand the values to its own process, which sends them."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class Callback:
    """A callable of the user's: called with (step, values) for each record, at the end its `close()` if it has one."""

    def __init__(self, dotted: str) -> None:
        self._call = find_callable(dotted)

    def write(self, step: int, values: Values) -> None:
        """Call it; with a copy, which it may keep."""
        self._call(step, dict(values))

    def close(self) -> None:
        """Call its `close`."""
        close = getattr(self._call, "close", None)
        if close is not None:
            close()


def require_writers(settings: MetricsConfig) -> None:
    """Find out before the work whether all writers are there.

    Raises:
        UserError: a package is not installed, or there is no such callable.
    """
    for name in settings.writers:
        if name == "wandb" and not _is_installed("wandb"):
            raise UserError(
                "metrics.writers names wandb, but the package wandb is not installed here; install it (pip install "
                "wandb), or leave it out"
            )
        if name not in WRITERS:
            find_callable(name)


def _is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name, such as the one of offline runs, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def find_callable(dotted: str) -> Callable[[int, Values], Any]:
    """The callable of a dotted name.

    Raises:
        UserError: its module cannot be imported, has no such callable, or one that takes no records.
    """
    module, _, name = dotted.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise UserError(
            f"metrics.writers names {dotted}, but {module} cannot be imported ({_in_words(error)}); put its folder on "
            f"PYTHONPATH, or correct the name"
        ) from error
    if not callable(found):
        what = f"{module} has nothing of that name" if found is None else f"that is no callable, but {found!r}"
        raise UserError(f"metrics.writers names {dotted}, but {what}; name a callable of {module}")
    if why := _why_it_takes_no_records(found):
        raise UserError(f"metrics.writers names {dotted}, {why}; name one that is called with (step, values)")
    return found


def _why_it_takes_no_records(found: Callable[..., Any]) -> str | None:
    """What is wrong with how a callable is declared, if anything is."""
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        return "which is async, and nobody would await it"
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of what is not written in Python it may not be known
        return None
    try:
        signature.bind(0, {})
    except TypeError as error:
        return f"which cannot take a record ({error})"
    return None


def open_writer(name: str, settings: MetricsConfig, folder: RunFolder, first_step: int) -> Writer:
    """The writer of a name in `metrics.writers`.

    Args:
        first_step: steps done before.

    Raises:
        UserError: it cannot begin.
    """
    try:
        if name == "jsonl":
            return JsonLines(folder, first_step)
        if name == "tensorboard":
            return TensorBoard(folder, first_step)
        return WeightsAndBiases(settings.wandb_project, folder) if name == "wandb" else Callback(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # wandb has many
        raise UserError(
            f"metrics.writers {name} cannot begin ({_in_words(error)}); put that right, or leave it out"
        ) from error


class Writers:
    """All writers of a run.

    Args:
        first_step: steps done before.
        say: called with a sentence when a writer is left out.

    Raises:
        UserError: one of them cannot begin.
    """

    def __init__(self, settings: MetricsConfig, folder: RunFolder, first_step: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._writers = {name: open_writer(name, settings, folder, first_step) for name in settings.writers}

    def write(self, step: int, values: Values) -> None:
        """Give everyone a record."""
        for name, writer in list(self._writers.items()):
            try:
                writer.write(step, values)
            except (Exception, SystemExit) as error:
                self._leave_out(name, f"at step {step}", error)

    def close(self) -> None:
        """Finish."""
        for name, writer in list(self._writers.items()):
            try:
                writer.close()
            except (Exception, SystemExit) as error:
                self._leave_out(name, "at the end of the run", error)

    def _leave_out(self, name: str, when: str, error: BaseException) -> None:
        del self._writers[name]
        sentence = f"metrics.writers {name} failed {when} and is left out from here on: {_in_words(error)}"
        logging.getLogger("skvr_dist").warning(sentence, exc_info=error)
        self._say(sentence)


def _in_words(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
