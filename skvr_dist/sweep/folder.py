"""The folder of an experiment.

sweep.json        the experiment's name
lock/             the sweep that is at work here (`skvr_dist.run.lock`)
results.jsonl     a line per run (`skvr_dist.sweep.results`)
slurm/            what submitit writes, if Slurm runs the runs
NAME/             a run (`skvr_dist.run.folder`); its config.yaml is there before it begins
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from skvr_dist.config.load import dump_config, load_config
from skvr_dist.config.tree import Config
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, naming_failure, prove_folder, write_whole
from skvr_dist.sweep.plan import DECIDED_HERE, PlannedRun


class SweepFolder:
    """Paths of an experiment's folder, whether it is there yet or not.

    Args:
        path: its `output_dir`; `~` is the home folder.

    Raises:
        UserError: it is no path of this machine.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local_path(path)
        self.results = self.path / "results.jsonl"
        self.slurm = self.path / "slurm"
        self._notes = self.path / "sweep.json"

    def require_of(self, experiment: str, runs: Sequence[PlannedRun]) -> None:
        """Refuse a folder of something else, or of this experiment with a run that was configured otherwise.

        A run that is new to the experiment, or is no longer in it, is no hindrance.

        Args:
            experiment: its name, that of its file.

        Raises:
            UserError: it is one, or cannot be written.
        """
        prove_folder(self.path)
        held = self._held()
        if held not in (None, f"the experiment {experiment}"):
            raise UserError(f"{self.path} holds {held}, not the experiment {experiment}; give another output_dir")
        for run in runs:
            if run.folder.config.exists():
                before = load_config([run.folder.config])
                if change := next(_changes(before, run.config), None):
                    raise UserError(
                        f"run {run.name} in {self.path} is there with another configuration: {change}; put it back, "
                        f"or give another output_dir"
                    )

    def _held(self) -> str | None:
        """What the folder is of, in words; None for an empty one, or one that is not there."""
        try:
            return f"the experiment {json.loads(self._notes.read_text(encoding='utf-8'))['experiment']}"
        except FileNotFoundError:
            others = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
            # A sweep that was killed at once has left its lock.
            return next((name for name in others if name != "lock"), None)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._notes} is damaged ({error}); remove it") from None

    def prepare(self, experiment: str, runs: Sequence[PlannedRun]) -> None:
        """Write the name of the experiment, and the configuration of each run where there is none yet.

        Raises:
            UserError: it cannot be written.
        """
        with naming_failure(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self._notes, json.dumps({"experiment": experiment}) + "\n")
        for run in runs:
            if not run.folder.config.exists():
                with naming_failure(run.folder.path):
                    run.folder.path.mkdir(parents=True, exist_ok=True)
                write_whole(run.folder.config, dump_config(run.config))


def _changes(before: Config, now: Config) -> Iterator[str]:
    """What is set otherwise in two configurations, in words."""
    old, new = (dict(_leaves(config.model_dump())) for config in (before, now))
    for key in [*old, *(key for key in new if key not in old)]:
        values = [old.get(key), new.get(key)]
        if key in DECIDED_HERE:  # the same place may be written in several ways
            values = [value and os.path.realpath(value) for value in values]
        if values[0] != values[1]:
            yield f"{key} was {old.get(key)} and is {new.get(key)} now"


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
