"""Play a run of any number of GPUs in one process: does every message meet its receiver, and can no rank hang?

    skvr-dryrun --config quickstart --config qwen3-8b --gpus 1024 parallel.pipeline=16 parallel.tensor=8 \\
        train.global_batch_size=512 train.micro_batch_size=1 data.lanes=512

Builds the real engine as each kind of rank of a made-up world, one after the other and at a size that takes no time,
and trains `--steps` steps with the plans of the run. What the ranks ask of each other is matched: every message has its
receiver, sizes agree, all members of a group ask for the same, and no order of sends, receives and collectives can
deadlock, also where the first use of a connection holds both of its ends, as NCCL's does. Needs no GPU and no data.
Exit code 1: something does not match.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import (
    Figure,
    add_configs,
    add_json,
    add_overrides,
    at_least,
    conclude,
    new_parser,
    parse,
    run_command,
)

if TYPE_CHECKING:
    from skvr_dist.lab.virtual.rank import Trace


# A rank may open 1,024 files on most systems, and many small waits for all ranks add up.
_WORLD_COLLECTIVES, _SOCKETS = 2, 100


def main() -> None:
    """Entry point."""
    run_command(run)


def run() -> int:
    """Trace, match and report; returns the exit code."""
    parser = new_parser(__doc__)
    add_configs(parser)
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N", help="ranks of the run")
    parser.add_argument("--steps", type=at_least(1), default=2, help="steps, each with a plan of its own (default: 2)")
    add_json(parser)
    add_overrides(parser)
    options = parse(parser)

    from skvr_dist.config.layouts import data_parallel_size
    from skvr_dist.config.load import load_config
    from skvr_dist.lab.estimate.layout import require_usable

    config = load_config(options.config, options.overrides)
    require_usable(config, options.gpus)
    replicas = data_parallel_size(config, options.gpus)

    from tqdm import tqdm

    from skvr_dist.lab.virtual.match import play
    from skvr_dist.lab.virtual.world import distinct_ranks, trace_world

    started = time.monotonic()
    total = len(distinct_ranks(config, options.gpus))
    traces = list(
        tqdm(trace_world(config, options.gpus, options.steps), total=total, desc="ranks", leave=False, disable=None)
    )
    records = {trace.rank: [*trace.start, *trace.steps] for trace in traces}
    wrong = play(records, first_use=False) or play(records, first_use=True)
    of_all = options.gpus if 1 < replicas < options.gpus else None
    rows = [_row(trace, options.steps, of_all) for trace in traces]
    seconds = time.monotonic() - started
    layout = f"{config.parallel.pipeline} stages x {replicas} replicas x {config.parallel.tensor} tensor-parallel"
    figure = Figure(
        f"{options.gpus} ranks ({layout}), {total} of them traced over {options.steps} steps in {seconds:.0f} s: "
        + ("; ".join(wrong) if wrong else "every message has its receiver, sizes agree, no order can deadlock"),
        "nothing that does not match",
        not wrong,
    )
    worst = {name: max(row[name] for row in rows) for name in ("world collectives a step", "sockets")}
    figures = [
        figure,
        Figure(
            f"{worst['world collectives a step']:g} collectives of all ranks a step",
            str(_WORLD_COLLECTIVES),
            worst["world collectives a step"] <= _WORLD_COLLECTIVES,
        ),
        Figure(f"{worst['sockets']} sockets of a rank over gloo", str(_SOCKETS), worst["sockets"] <= _SOCKETS),
    ]
    record = {"gpus": options.gpus, "steps": options.steps, "seconds": seconds, "wrong": wrong, "ranks": rows}
    table = tabulate([row.values() for row in rows], headers=list(rows[0]), tablefmt="github")
    return conclude(figures, table=table, record=record, json_file=options.json)


def _row(trace: Trace, steps: int, world_size: int | None) -> dict[str, Any]:
    """What a rank asks of others in a step, on average, and how many it talks to."""
    from skvr_dist.lab.virtual.record import Operation

    asked = [event for event in trace.steps if isinstance(event, Operation)]
    talks = [event for event in [*trace.start, *trace.steps] if isinstance(event, Operation)]
    most = max(len(operation.ranks) for operation in talks)
    collectives = [operation for operation in asked if operation.peer is None]
    return {
        "rank": trace.rank,
        "stage": trace.stage,
        "replica": trace.replica,
        "tensor": trace.tensor,
        "groups": len({operation.group for operation in talks}),
        "largest group": most,
        "sockets": trace.sockets,
        "collectives a step": len(collectives) / steps,
        "world collectives a step": trace.world_operations(world_size) / steps,
        "messages sent": sum(operation.name == "send" for operation in asked) / steps,
        "messages received": sum(operation.name == "receive" for operation in asked) / steps,
    }


if __name__ == "__main__":
    main()
