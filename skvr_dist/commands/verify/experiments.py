"""Try every experiment out: one seed of each run, with a tiny model for four steps, and the figures of all of them.

    skvr-verify experiments
    skvr-verify experiments my-experiment.yaml --corpus ~/texts model.hidden_size=64

Without files, those that come with this project (configs/experiment/sweeps), on its own source. All runs have one rank
and read one data set. The model is 36 wide, which suits 4 and 9 heads of 16; `section.key=value` overrides a key of all
runs. Exits 1 when a run fails: the table says how, and everything that the runs have written is kept then.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

import skvr_dist
from skvr_dist.command import Figure, a_path, add_json, conclude
from skvr_dist.errors import UserError

if TYPE_CHECKING:
    from skvr_dist.sweep.loop import Status

_PACKAGE = Path(skvr_dist.__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    words = "YAML files (default: all); overrides"
    parser.add_argument("words", nargs="*", metavar="EXPERIMENT | KEY=VALUE", help=words)
    parser.add_argument("--corpus", type=a_path, metavar="FOLDER", help="text to train on (default: this project's)")
    parser.add_argument("--output", type=a_path, metavar="FOLDER", help="keep the runs and the figures there")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run them; returns the exit code.

    Raises:
        UserError: an experiment, the corpus or the output folder is not what it should be.
        RunInterrupted: a signal has ended it.
    """
    from skvr_dist.files import prove_new_folder

    overrides = [word for word in options.words if "=" in word]
    files = [Path(word) for word in options.words if "=" not in word]
    files = files or sorted((_PACKAGE / "configs/experiment/sweeps").glob("*.yaml"))
    if twice := [name for name, count in Counter(file.stem for file in files).items() if count > 1]:
        raise UserError(f"two experiments are called {twice[0]}; try them one after the other")
    folder = prove_new_folder(options.output) if options.output else Path(tempfile.mkdtemp(prefix="experiments-"))
    code = 0
    try:
        code = _try_all(files, overrides, options.corpus or _PACKAGE, folder, options.json)
    finally:
        if not options.output and code == 0:
            shutil.rmtree(folder)
    if code and not options.output:
        print(f"kept: {folder}")
    return code


def _try_all(files: list[Path], overrides: list[str], corpus: Path, folder: Path, json_file: Path | None) -> int:
    import os

    from tqdm import tqdm

    from skvr_dist.lab.verify.experiments import plan, prepare_text, tiny, try_out

    data, runs = folder / "data", folder / "runs"
    planned = {file.stem: plan(file, runs / file.stem, [*tiny(data), *overrides]) for file in files}
    prepare_text(corpus, data)
    cores = len(os.sched_getaffinity(0))
    bar = tqdm(planned.items(), leave=False, disable=None)
    found = {name: try_out(name, these, runs / name, cores) for name, these in bar}
    rows = [
        {"experiment": name, "run": status.run.name, "state": status.state, "error": status.error}
        for name, statuses in found.items()
        for status in statuses
    ]
    table = tabulate([row.values() for row in rows], headers=["experiment", "run", "state", "error"], tablefmt="github")
    table += f"\n\nfigures of their results: {', '.join(_draw(found, folder)) or 'none'}"
    failed = [row for row in rows if row["state"] != "finished"]
    figure = Figure(f"{len(failed)} of {len(rows)} runs failed", "none", not failed)
    return conclude([figure], table=table, record=rows, json_file=json_file)


def _draw(found: dict[str, list[Status]], folder: Path) -> list[str]:
    """Draw every figure that the finished runs give; returns their names."""
    from skvr_dist.sweep.figures.build import FIGURES
    from skvr_dist.sweep.figures.read import read_methods

    with_results = [name for name, these in found.items() if any(status.state == "finished" for status in these)]
    if not with_results:
        return []
    methods, _ = read_methods([folder / "runs" / name / "results.jsonl" for name in with_results])
    (folder / "figures").mkdir()
    return [name for name in FIGURES if (figure := FIGURES[name](methods)) and figure.write(folder / "figures", "png")]
