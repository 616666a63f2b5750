"""Try every experiment out: one seed of each run, with a tiny model for four steps, and the figures of all of them.

    skvr-verify experiments
    skvr-verify experiments my-experiment.yaml --corpus ~/texts

Without files, those that come with this project (configs/experiment/sweeps). Exits 1 when a run fails; the table says
how, and --output keeps what it printed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

import skvr_dist
from skvr_dist.command import Figure, a_path, add_json, conclude

if TYPE_CHECKING:
    from skvr_dist.sweep.loop import Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("files", nargs="*", type=a_path, metavar="EXPERIMENT", help="YAML files (default: all)")
    parser.add_argument("--corpus", type=a_path, metavar="FOLDER", help="text to train on (default: this project's)")
    parser.add_argument("--output", type=a_path, metavar="FOLDER", help="keep the runs and the figures there")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run them; returns the exit code.

    Raises:
        UserError: an experiment, the corpus or the output folder is not what it should be.
    """
    if options.output:
        from skvr_dist.files import prove_new_folder

        return _try_all(options, prove_new_folder(options.output))
    with tempfile.TemporaryDirectory() as folder:
        return _try_all(options, Path(folder))


def _try_all(options: argparse.Namespace, folder: Path) -> int:
    import os

    from tqdm import tqdm

    from skvr_dist.lab.verify.experiments import tiny, try_out
    from skvr_dist.sweep.figures.build import FIGURES
    from skvr_dist.sweep.figures.read import read_methods

    package = Path(skvr_dist.__file__).parent
    files = options.files or sorted((package / "configs/experiment/sweeps").glob("*.yaml"))
    overrides = tiny(options.corpus or package, folder / "data")
    found: dict[str, list[Status]] = {}
    for file in tqdm(files, leave=False, disable=None):
        found[file.stem] = try_out(file, folder / file.stem, overrides, len(os.sched_getaffinity(0)))
    (folder / "figures").mkdir()
    methods, _ = read_methods([folder / name / "results.jsonl" for name in found])
    drawn = [name for name in FIGURES if (figure := FIGURES[name](methods)) and figure.write(folder / "figures", "png")]
    rows = [
        {"experiment": name, "run": status.run.name, "state": status.state, "error": status.error}
        for name, statuses in found.items()
        for status in statuses
    ]
    failed = [row for row in rows if row["state"] != "finished"]
    figures = [
        Figure(f"{len(failed)} of {len(rows)} runs failed", "none", not failed),
        Figure(f"figures of their results: {', '.join(drawn) or 'none'}", "one at least", bool(drawn)),
    ]
    table = tabulate([row.values() for row in rows], headers=["experiment", "run", "state", "error"], tablefmt="github")
    return conclude(figures, table=table, record=rows, json_file=options.json)
