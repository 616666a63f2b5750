"""Start a run again when it ends before its last step: ranks die, nodes fail, jobs are preempted.

    python launch/keep_running.py --output-dir runs/mine -- deepspeed --num_gpus 4 launch/pretrain.py \\
        --config configs/experiment/quickstart.yaml train.output_dir=runs/mine

The run goes on from its latest checkpoint. SIGTERM, SIGUSR1 and Ctrl+C are passed to the ranks, which save and end;
after that the run is not started again (exit code 75). A mistake of the user's (exit code 2) ends it at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from skvr_dist.cluster.keep_running import KeptRun
from skvr_dist.errors import run_command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="FOLDER", help="the run's train.output_dir")
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="without a new checkpoint between (default: 3)"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="a deepspeed, torchrun or mpirun line, after --")
    options = parser.parse_args()
    return KeptRun(options.command, options.output_dir, options.restarts).run()


if __name__ == "__main__":
    run_command(main)
