"""Every run of an experiment for a few steps of a tiny model: what would end a sweep after hours, in a second a run.

The sweep's own plan, loop and results; only its runs do not start as commands: each is a fork of a process that has
imported everything, which takes a quarter of the time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from skvr_dist.config.load import load_config
from skvr_dist.data.prepare.corpus import open_corpus
from skvr_dist.data.prepare.prepare import prepare
from skvr_dist.data.tokenizers.train import train_tokenizer
from skvr_dist.errors import EXIT_USAGE, UserError
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


def tiny(corpus: Path, folder: Path) -> list[str]:
    """Overrides that make any experiment a tiny one, on text that is prepared into a folder.

    Args:
        corpus: a folder of text; a quarter of its documents is held out.
    """
    text = open_corpus(str(corpus))
    tokenizer = train_tokenizer(text, vocab_size=_VOCABULARY)
    prepare(text, tokenizer, folder, num_shards=_LANES, validation_share=0.25)
    model = [f"model.{key}={value}" for key, value in _MODEL.items()]
    sets = [f"data.{name}={folder / name}" for name in ("train", "validation")]
    data = [*sets, f"data.tokenizer={folder}/tokenizer.model", "data.sequence_length=32", f"data.lanes={_LANES}"]
    return [*model, *data, "train.initial_weights=null", "evaluate.sequences=4"]


def try_out(file: Path, folder: Path, overrides: Sequence[str], at_once: int) -> list[Status]:
    """Run the first seed of each run and branch of an experiment; returns what became of them.

    Args:
        file: the experiment's.
        folder: where its runs and `results.jsonl` go.
        at_once: runs at a time.
    """
    experiment = shortened(read_experiment(file), STEPS)
    experiment = experiment.model_copy(update={"output_dir": str(folder), "seeds": experiment.seeds[:1]})
    runs = plan_runs(experiment, overrides)
    SweepFolder(folder).prepare(file.stem, runs)
    results = Results(folder / "results.jsonl")
    sweep = Sweep(runs, _Forks(at_once), results, retries=0, commit=None, show=lambda _: None)
    sweep.run()
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
    """Train in this process; what it prints is added to the run's console, and an exit code is that of the command."""
    with console.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of readers, as in a command; a fork server's child has its own
    try:
        pretrain(load_config([config]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
