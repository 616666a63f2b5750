"""Draw the figures of an experiment, each with the table behind it, from its results alone.

    skvr-plot runs/recipes/results.jsonl --output runs/recipes/figures
    skvr-plot runs/shallow/results.jsonl runs/recipes/results.jsonl --output figures --figure cache --format svg

cache       loss against cache bytes per token, with models of fewer layers on one line
retention   loss against the share of the layers that keep a cache, and what it costs
curves      loss over the tokens seen, at each retention
scaling     loss against the size of the model, fitted at each retention; only where a recipe has several sizes

Each is a picture, a page with its table (NAME.md) and the same as JSON (NAME.json). Runs with several seeds are means
with 95 % intervals. Runs that have not finished, or whose loss is no number, are left out, and said to be.
"""

from __future__ import annotations

from skvr_dist.command import a_path, new_parser, parse, run_command
from skvr_dist.errors import UserError
from skvr_dist.files import prove_folder

_FIGURES = ("cache", "retention", "curves", "scaling")
_NEEDS = {
    "curves": "evaluations of one step of all seeds of a run",
    "scaling": "a recipe with models of two sizes at least",
}


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Read the results, draw, and print the tables.

    Raises:
        UserError: the results cannot be read, or hold nothing of what was asked for.
    """
    parser = new_parser(__doc__)
    parser.add_argument("results", nargs="+", type=a_path, metavar="RESULTS", help="results.jsonl of an experiment")
    parser.add_argument("--output", required=True, type=a_path, metavar="FOLDER", help="where the figures go")
    parser.add_argument(
        "--figure", action="append", choices=_FIGURES, help="one of them; may be repeated (default: all)"
    )
    parser.add_argument("--format", default="png", choices=("png", "svg"), help="of the pictures (default: png)")
    parser.add_argument("--method", action="append", metavar="NAME", help="a run's name without its seed; repeated")
    options = parse(parser)

    from skvr_dist.sweep.figures.build import FIGURES
    from skvr_dist.sweep.figures.read import read_methods

    methods, left_out = read_methods(options.results)
    known = [method.label for method in methods]
    if unknown := [name for name in options.method or [] if name not in known]:
        raise UserError(f"--method {unknown[0]} has no finished run; there are {', '.join(known)}")
    methods = [method for method in methods if method.label in (options.method or known)]
    folder = prove_folder(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.figure or _FIGURES:
        figure = FIGURES[name](methods)
        if figure is None or not figure.panels:
            if options.figure:
                raise UserError(f"--figure {name} needs {_NEEDS[name]}; add their results")
            continue
        figure.notes += left_out
        files = figure.write(folder, options.format)
        print(f"{figure.markdown(files[0].name)}\nwritten: {', '.join(map(str, files))}\n")


if __name__ == "__main__":
    main()
