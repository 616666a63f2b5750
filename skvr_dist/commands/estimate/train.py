"""What training takes: memory by stage, bytes by link, bubble, predicted time of a step and MFU.

    skvr-estimate train --config quickstart --config qwen3-8b --gpus 64 parallel.pipeline=4 parallel.tensor=2 \\
        train.global_batch_size=256 train.micro_batch_size=1 data.lanes=256

Memory is that of tensors at the peak of a step on a GPU; allocator, CUDA and NCCL take some on top. `skvr-verify
estimate` checks memory and bytes against the real engine. Times follow from peaks and bandwidths (`--gpu`, `--tflops`,
`--link-gbps`, `--network-gbps`) and an assumed `--efficiency`: they are predictions, good for comparing layouts.

With `--propose` the layout of the configuration is a beginning only: layouts of that many GPUs are ranked by the
predicted time of a step, among those that fit in `--memory-gib`, and it is said why others lose.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from skvr_dist.command import add_configs, add_json, add_overrides, at_least, positive, share, write_json

if TYPE_CHECKING:
    from skvr_dist.lab.estimate.layout import Estimate, StageEstimate
    from skvr_dist.lab.estimate.propose import Proposal
    from skvr_dist.lab.estimate.speed import Rates

_SHOWN_FITTING, _SHOWN_OTHERS = 12, 4  # rows of proposals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_configs(parser)
    parser.add_argument("--gpus", type=at_least(1), required=True, metavar="N", help="ranks of the run")
    parser.add_argument("--gpu", choices=("h100", "h200", "a100"), default="h100", help="whose rates (default: h100)")
    parser.add_argument("--tflops", type=positive, metavar="X", help="another peak of dense bf16 products")
    parser.add_argument("--link-gbps", type=positive, metavar="X", help="GB/s to GPUs of the same host, one way")
    parser.add_argument("--network-gbps", type=positive, metavar="X", help="GB/s to GPUs of other hosts, one way")
    parser.add_argument("--gpus-per-host", type=at_least(1), default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--efficiency", type=share, metavar="X", help="share of the peak reached (default: 0.6)")
    parser.add_argument("--memory-gib", type=positive, metavar="X", help="memory of a GPU that a process can use")
    parser.add_argument("--propose", action="store_true", help="rank layouts instead")
    add_json(parser)
    add_overrides(parser)


def run(options: argparse.Namespace) -> int:
    """Estimate and print; returns the exit code."""
    from skvr_dist.config.load import load_config
    from skvr_dist.lab.estimate.layout import estimate
    from skvr_dist.lab.estimate.propose import propose, require_any

    config = load_config(options.config, options.overrides)
    rates = _rates(options)
    if options.propose:
        found = propose(config, options.gpus, rates)
        require_any(found, rates)
        layouts = [each.record(rates) for each in found]
        print(_proposals(found, rates))
        record: dict[str, Any] = {"gpus": options.gpus, "rates": dataclasses.asdict(rates), "layouts": layouts}
    else:
        whole = estimate(config, options.gpus, rates)
        record = {
            "gpus": options.gpus,
            "layout": whole.layout,
            "rates": dataclasses.asdict(rates),
            "stages": [_stage_record(stage) for stage in whole.stages],
            "speed": dataclasses.asdict(whole.speed),
        }
        print(_text(whole, rates))
    if options.json is not None:
        write_json(options.json, record)
    return 0


def _proposals(found: list[Proposal], rates: Rates) -> str:
    """The best layouts, and the nearest of those that do not fit."""
    rows = [each.row(rates) for each in found]
    fitting = [row for row in rows if row["fits"]]
    shown = [*fitting[:_SHOWN_FITTING], *[row for row in rows if not row["fits"]][:_SHOWN_OTHERS]]
    left_out = f"; {len(rows) - len(shown)} more are in the file of --json" if len(rows) > len(shown) else ""
    lines = [
        tabulate([row.values() for row in shown], headers=list(rows[0]), tablefmt="github"),
        f"{len(rows)} layouts, predicted, not measured; {len(fitting)} fit in {rates.memory_gib:g} GiB{left_out}",
        f"the first one: {found[0].overrides}",
    ]
    return "\n\n".join(lines)


def _rates(options: argparse.Namespace) -> Rates:
    from skvr_dist.lab.estimate.speed import PRESETS

    given = {
        "tflops": options.tflops,
        "host_gbytes": options.link_gbps,
        "network_gbytes": options.network_gbps,
        "memory_gib": options.memory_gib,
        "gpus_per_host": options.gpus_per_host,
        "efficiency": options.efficiency,
    }
    return dataclasses.replace(PRESETS[options.gpu], **{key: value for key, value in given.items() if value})


def _stage_record(stage: StageEstimate) -> dict[str, Any]:
    return {
        "stage": stage.rank.stage,
        "parameters": stage.rank.parameters,
        "memory_bytes": dataclasses.asdict(stage.memory) | {"total": stage.memory.total},
        "bytes_per_step": {f"{link} {operation}": size for (link, operation), size in stage.traffic.items()},
    }


def _text(whole: Estimate, rates: Rates) -> str:
    from skvr_dist.lab.estimate.layout import GIB

    memory, traffic = [], []
    for stage in whole.stages:
        held = stage.memory
        parts = (held.parameters, held.gradients, held.optimizer, held.zero_buffers, held.activations,
                 held.pipeline_buffers, held.loss, held.total)  # fmt: skip
        first, stop = stage.rank.bounds
        memory.append([stage.rank.stage, f"{first} to {stop - 1}", f"{stage.rank.parameters:,}",
                       *(f"{part / GIB:.2f}" for part in parts), held.moment])  # fmt: skip
        traffic += [[stage.rank.stage, *link, f"{size:,}"] for link, size in stage.traffic.items()]
    headers = ["stage", "layers", "weights", "GiB: weights", "gradients", "optimizer", "ZeRO buffers", "activations",
               "pipeline buffers", "loss", "all", "at the"]  # fmt: skip
    speed, worst = whole.speed, whole.worst
    spare = rates.memory_gib - worst.memory.total / GIB
    verdict = f"fits with {spare:.2f} GiB to spare" if spare >= 0 else f"does not fit: {-spare:.2f} GiB are missing"
    costs = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in speed.costs.items())
    lines = [
        f"{whole.gpus} GPUs: {whole.layout}",
        tabulate(memory, headers=headers, tablefmt="github"),
        tabulate(traffic, headers=["stage", "link", "operation", "bytes of a rank and step"], tablefmt="github"),
        f"worst rank: stage {worst.rank.stage}, {worst.memory.total / GIB:.2f} of {rates.memory_gib:g} GiB, {verdict}",
        f"predicted, not measured: step {speed.step_seconds:.3f} s, MFU {speed.mfu:.1%}, bubble {speed.bubble:.1%}; "
        f"computing {speed.computing_seconds:.3f} s, {costs}",
    ]
    return "\n\n".join(lines)
