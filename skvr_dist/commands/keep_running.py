"""Start a run again when it ends before its last step: ranks die, nodes fail, jobs are preempted.

    skvr-keep-running --output-dir runs/mine -- deepspeed --num_gpus 4 --module skvr_dist.commands.pretrain \\
        --config quickstart train.output_dir=runs/mine

The run resumes from its latest checkpoint. SIGTERM, SIGUSR1 and Ctrl+C are passed to the ranks, which save and end;
after that the run is not started again (exit code 75). A mistake of the user's (exit code 2) ends it at once.
"""

from __future__ import annotations

from skvr_dist.command import a_path, at_least, new_parser, run_command


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Start the command until its run has finished; returns the exit code of the last attempt."""
    parser = new_parser(__doc__)
    parser.add_argument("--output-dir", type=a_path, required=True, metavar="FOLDER", help="the run's train.output_dir")
    parser.add_argument(
        "--restarts", type=at_least(0), default=3, metavar="N", help="without a new checkpoint between (default: 3)"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="a deepspeed, torchrun or mpirun line, after --")
    options = parser.parse_args()  # in this order: what follows -- is another command's

    from skvr_dist.cluster.keep_running import KeptRun

    return KeptRun(options.command, options.output_dir, options.restarts).run()


if __name__ == "__main__":
    main()
