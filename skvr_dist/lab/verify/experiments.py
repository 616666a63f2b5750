"""Every run of an experiment for a few steps of a tiny model: what would end a sweep after hours, in a second a run.

The sweep's own plan, loop and results; only its runs do not start as commands: each is a fork of a process that has
imported everything, which takes a quarter of the time. All of them read one data set, whatever the experiment mixes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from skvr_dist.cluster.interrupt import SIGNALS
from skvr_dist.config.load import load_config
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import EXIT_MISSED, RunInterrupted, UserError
from skvr_dist.lab.verify.ranks import ctrl_c_for_this_process_alone, fork_server
from skvr_dist.sweep.experiment import read_experiment, shortened
from skvr_dist.sweep.folder import SweepFolder
from skvr_dist.sweep.loop import Status, Sweep
from skvr_dist.sweep.plan import PlannedRun, plan_runs
from skvr_dist.sweep.results import Results
from skvr_dist.train.loop import pretrain

STEPS = 4
_VOCABULARY = 512
_LANES = 32
"""For recipes with micro-batches of 32."""
_MODEL = {"vocab_size": _VOCABULARY, "hidden_size": 36, "intermediate_size": 48, "head_dim": 16}
"""A width for models of 4 and of 9 heads."""


def tiny(data: Path) -> list[str]:
    """Overrides that make an experiment a tiny one, on the data that `prepare_text` writes into a folder."""
    model = [f"model.{key}={value}" for key, value in _MODEL.items()]
    sets = [f"data.{name}={data / name}" for name in ("train", "validation")]
    rest = [f"data.tokenizer={data}/tokenizer.model", "data.sequence_length=32", f"data.lanes={_LANES}"]
    return [*model, *sets, *rest, "train.initial_weights=null", "evaluate.sequences=4"]


def prepare_text(corpus: Path, data: Path) -> None:
    """Train a tokenizer on a folder of text and prepare data with it; a quarter of the documents is held out.

    Raises:
        UserError: there is too little text.
    """
    text = open_corpus(str(corpus))
    try:
        tokenizer = train_tokenizer(text, vocab_size=_VOCABULARY)
        prepare(text, tokenizer, data, num_shards=_LANES, validation_share=0.25)
    except UserError as error:
        raise UserError(f"{corpus} has too little text to try experiments out with ({error}); name more") from None


def plan(file: Path, folder: Path, overrides: Sequence[str]) -> list[PlannedRun]:
    """The first seed of each run and branch of an experiment, of a few steps.

    Args:
        file: the experiment's.
        folder: where its runs go.

    Raises:
        UserError: it is no experiment, or its runs have several ranks.
    """
    experiment = shortened(read_experiment(file), STEPS)
    if experiment.place.ranks > 1:
        raise UserError(
            f"{file}: place.ranks is {experiment.place.ranks}, but runs are tried with 1; "
            f"use tools/sweep.py {file} --try-steps {STEPS}"
        )
    experiment = experiment.model_copy(update={"output_dir": str(folder), "seeds": experiment.seeds[:1]})
    return plan_runs(experiment, overrides)


def try_out(name: str, runs: Sequence[PlannedRun], folder: Path, at_once: int) -> list[Status]:
    """Train the runs of an experiment; returns what became of them.

    Args:
        folder: where they go, and `results.jsonl`.
        at_once: runs at a time.

    Raises:
        RunInterrupted: a signal has ended it.
    """
    SweepFolder(folder).prepare(name, runs)
    results = Results(folder / "results.jsonl")
    sweep = Sweep(runs, _Forks(at_once), results, retries=0, commit=None, show=lambda _: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        if ended_by := sweep.run():
            raise RunInterrupted(f"{ended_by} ended the runs of {name}; start it again")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return sweep.statuses


class _Forks:
    """Runs of one rank as forks, as `skvr_dist.sweep.places.Machine` has it."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once

    def start(self, run: PlannedRun) -> _Fork:
        process = fork_server().Process(target=_train, args=(run.folder.config, run.folder.console))
        with ctrl_c_for_this_process_alone():
            process.start()
        return _Fork(process)


class _Fork:
    """A run that was started."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def stop(self) -> None:
        self._process.terminate()


def _train(config: Path, console: Path) -> None:
    """Train in this process; what it prints is added to the run's console, and it ends as the command would."""
    with console.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    # Of the processes that read ahead, as in a command; a fork server's children have its own method.
    multiprocessing.set_start_method("fork", force=True)
    try:
        pretrain(load_config([config]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_MISSED)
