"""results.jsonl: a line per run of an experiment, with all that tables and figures need.

name, overrides, seed    the run, and what distinguishes it from the others
state, error             `finished`, `failed` or `unfinished`; the sentence that a failed one ended with
step, steps, tokens      steps done, steps of the run, tokens seen
seconds                  of its training steps
train_loss               of the last step, nats per token
held_out                 loss by cache strategy at the last evaluation, nats per token
held_out_by_step         the same at every evaluation, [[step, {strategy: loss}], ...]
retention                share of the layers that keep a cache, by strategy
commits, version         of the code that trained it
config                   its resolved configuration
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from skvr_dist import __version__
from skvr_dist.files import as_json, write_whole
from skvr_dist.routing import CacheStrategy
from skvr_dist.sweep.plan import PlannedRun

HELD_OUT = "evaluate/loss/"
"""What the keys of held-out losses begin with in metrics.jsonl; the cache strategy follows."""
_PACKAGE = Path(__file__).parents[1]


class Results:
    """The results of an experiment, written anew whenever a run has ended.

    Args:
        file: results.jsonl.
        keeps_other_seeds: whether its lines of seeds that are not run this time stay.
    """

    def __init__(self, file: Path, *, keeps_other_seeds: bool = False) -> None:
        self._file, self._keeps_other_seeds = file, keeps_other_seeds
        self._of_finished: dict[str, str] = {}

    def write(self, runs: Sequence[PlannedRun], errors: Mapping[str, str]) -> None:
        """Write a line for each run, in their order; the file is replaced as a whole.

        Where lines of other seeds of the same runs stay, they follow the others, as long as their folders are there.

        Args:
            errors: sentences of the runs that failed, by name.

        Raises:
            UserError: it cannot be written.
        """
        lines = []
        for run in runs:
            if run.name not in self._of_finished:
                line = as_json(result_of(run, errors.get(run.name)))
                if not run.is_finished():
                    lines.append(line)
                    continue
                self._of_finished[run.name] = line
            lines.append(self._of_finished[run.name])
        if self._keeps_other_seeds:
            lines += self._of_other_seeds(runs)
        write_whole(self._file, "".join(f"{line}\n" for line in lines))

    def _of_other_seeds(self, runs: Sequence[PlannedRun]) -> list[str]:
        """The lines of seeds that are not run this time."""
        names = {run.name for run in runs}
        titles = {run.name.removesuffix(f"seed-{run.config.train.seed}") for run in runs}
        found = []
        for text in self._file.read_text("utf-8", "replace").splitlines() if self._file.exists() else ():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # one that is damaged is written anew
                line = json.loads(text)
                name, title = line["name"], line["name"].removesuffix(f"seed-{line['seed']}")
                if name not in names and title in titles and (self._file.parent / name).is_dir():
                    found.append(text)
        return found


def result_of(run: PlannedRun, error: str | None = None) -> dict[str, Any]:
    """The line of a run, from its own files."""
    config, records = run.config, run.folder.metric_records()
    steps = [record for record in records if "train/loss" in record]
    evaluations = [
        [record["step"], {key.removeprefix(HELD_OUT): record[key] for key in record if key.startswith(HELD_OUT)}]
        for record in records
        if any(key.startswith(HELD_OUT) for key in record)
    ]
    step_tokens = config.train.global_batch_size * config.data.sequence_length
    strategies = CacheStrategy.parse_all(
        config.evaluate.strategies, config.model.num_hidden_layers, config.evaluate.profiles
    )
    last = steps[-1]["step"] if steps else 0
    return {
        "name": run.name,
        "overrides": list(run.overrides),
        "seed": config.train.seed,
        "state": "finished" if run.is_finished() else "failed" if error else "unfinished",
        "error": error,
        "step": last,
        "steps": config.train.steps,
        "tokens": steps[-1].get("train/tokens_seen", last * step_tokens) if steps else 0,  # a branch's with its trunk's
        "seconds": sum(step_tokens / record["train/tokens_per_second"] for record in steps),
        "train_loss": steps[-1]["train/loss"] if steps else None,
        "held_out": evaluations[-1][1] if evaluations else None,
        "held_out_by_step": evaluations,
        "retention": {name: strategy.retention for name, strategy in strategies.items()},
        "commits": run.folder.notes().get("commits", []),
        "version": _version(run),
        "config": config.model_dump(),
    }


def _version(run: PlannedRun) -> str | None:
    """The release that trained it; None if it has not begun."""
    if not run.folder.versions.exists():
        return None
    return str(json.loads(run.folder.versions.read_text(encoding="utf-8"))["skvr-dist"])


def source_commit() -> str | None:
    """The commit of this checkout, with `+` if files were changed since; None for an installed release."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # another repository may hold the environment
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def note_commit(run: PlannedRun, commit: str | None) -> None:
    """Note that code of this commit trains a run from now on."""
    known = run.folder.notes().get("commits", [])
    name = commit or __version__
    if known[-1:] != [name]:
        run.folder.note(commits=[*known, name])
