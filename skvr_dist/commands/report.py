"""Compare a standard and a routed run: retention curves in one picture, table, continuations, speed.

    skvr-report --standard runs/quickstart/standard --routed runs/quickstart/routed --output runs/quickstart

Either may be an imported checkpoint. Both are measured over the held-out data of the first that was trained here, or
over that of --data and --sequence-length.
"""

from __future__ import annotations

from skvr_dist.command import a_path, at_least, new_parser, parse, run_command
from skvr_dist.files import prove_folder


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> None:
    """Measure both runs and write the report."""
    parser = new_parser(__doc__)
    parser.add_argument("--standard", type=a_path, required=True, metavar="RUN")
    parser.add_argument("--routed", type=a_path, required=True, metavar="RUN")
    parser.add_argument("--output", type=a_path, required=True, metavar="FOLDER")
    parser.add_argument("--strategies", nargs="+", metavar="S", help="cache strategies (default: five)")
    parser.add_argument(
        "--sequences",
        type=at_least(1, 10**7),
        metavar="N",
        help="held-out sequences (default: 256, or as many as there are)",
    )
    parser.add_argument("--data", metavar="FOLDER", help="another held-out data set than the runs'")
    parser.add_argument(
        "--sequence-length", type=at_least(1, 10**8), metavar="N", help="tokens per sequence (default: the runs')"
    )
    parser.add_argument("--prompt", help="text to continue (default: the beginning of the held-out data)")
    options = parse(parser)

    from skvr_dist.evaluate.curve import DEFAULT_STRATEGIES
    from skvr_dist.evaluate.report import write_report

    report = write_report(
        options.standard,
        options.routed,
        prove_folder(options.output),
        strategies=options.strategies or DEFAULT_STRATEGIES,
        sequences=options.sequences,
        prompt=options.prompt,
        data=options.data,
        sequence_length=options.sequence_length,
    )
    print(report.read_text(encoding="utf-8"))
    print(f"written: {report}")


if __name__ == "__main__":
    main()
