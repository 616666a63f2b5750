"""What a configuration would do, worked out without starting anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate

from skvr_dist.checkpoint.folder import Checkpoint
from skvr_dist.config.layouts import data_parallel_size, zero_stage_in_use
from skvr_dist.config.tree import Config
from skvr_dist.data.reader import SequenceStream
from skvr_dist.model.decoder import Decoder
from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json
from skvr_dist.parallel.split import Bounds, stage_bounds
from skvr_dist.routing import crossing_elements, crossing_layers
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.inputs import open_inputs
from skvr_dist.train.plans import plan_of_step
from skvr_dist.train.resume import data_differences, preview_resume
from skvr_dist.train.writers import require_writers

_ROWS = 4096  # micro-batches whose donors are drawn for the averages, in whole steps from all over the run
_READS = 2**26  # what their crossing sets may take: micro-batches x layers x stages


def describe(config: Config, world_size: int) -> str:
    """Layout, sizes, traffic and the DeepSpeed configuration, as text.

    Opens the data sets and builds every stage (without storage), so it raises what a run would raise at its start.
    """
    replicas = data_parallel_size(config, world_size)
    inputs = open_inputs(config, world_size)
    RunFolder(config.train.output_dir).prove_writable()
    require_writers(config.metrics)
    resumed = preview_resume(config, inputs.sequences.fingerprint(), inputs.tokenizer)
    bounds = stage_bounds(config.model, config.parallel, config.data.sequence_length)
    most_rows = max(1, min(_ROWS, _READS // (config.model.num_hidden_layers * len(bounds))))
    drawn = max(1, most_rows // config.num_micro_batches)
    plans = [plan_of_step(config, number * config.train.steps // drawn) for number in range(drawn)]
    rows_of_plans = [donors for plan in plans for donors in plan.donors][:most_rows]
    tokens_per_step = config.train.global_batch_size * config.data.sequence_length
    facts = [
        [
            "ranks",
            f"{world_size} = {len(bounds)} stages x {replicas} replicas x {config.parallel.tensor} tensor-parallel",
        ],
        ["ZeRO stage, precision", f"{zero_stage_in_use(config, replicas)}, {config.train.precision}"],
        ["micro-batches per step", f"{config.num_micro_batches}, {config.num_micro_batches // replicas} per replica"],
        ["passes per step", f"{config.num_passes}, {config.num_passes // replicas} per replica"],
        *_tokens(config, tokens_per_step, inputs.sequences, resumed),
        *[["examples", words] for words in inputs.examples],
        *[["notice", words] for words in inputs.notices],
        ["held-out sequences", f"{len(inputs.held_out) * config.train.micro_batch_size} per evaluation"],
        [
            "starts from",
            str(resumed.folder) if resumed else config.train.initial_weights or f"seed {config.train.seed}",
        ],
        ["cross-layer reads", f"{mean(p.cross_layer_share for p in plans):.1%}"],
        ["K/V projections skipped", f"{mean(p.skipped_kv_share for p in plans):.1%}"],
    ]
    header = ["stage", "layers", "parameters", "layers whose K/V cross to the next (hidden states sent)"]
    return "\n\n".join(
        [
            tabulate(facts, tablefmt="plain"),
            tabulate(_rows_of_stages(config, bounds, rows_of_plans), headers=header, tablefmt="github"),
            "DeepSpeed configuration:\n" + json.dumps(deepspeed_json(config, world_size), indent=2),
        ]
    )


def _rows_of_stages(
    config: Config, bounds: Sequence[Bounds], rows_of_plans: Sequence[NDArray[np.int64]]
) -> list[list[object]]:
    """Number, layers, parameters and crossing traffic of each stage, in the mean over rows of plans."""
    rows: list[list[object]] = []
    for stage, (start, stop) in enumerate(bounds):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Decoder(config.model, start, stop).parameters())
        crossing = "-"
        if stop < config.model.num_hidden_layers:
            layers_crossing = mean(len(crossing_layers(donors, stop)) for donors in rows_of_plans)
            sizes = {"hidden_size": config.model.hidden_size, "kv_size": config.model.kv_size}
            per_token = mean(crossing_elements(donors, stop, tokens=1, **sizes) for donors in rows_of_plans)
            crossing = f"{layers_crossing:.2f} ({per_token / config.model.hidden_size:.2f})"
        rows.append([stage, f"{start} to {stop - 1}", f"{parameters:,}", crossing])
    return rows


def _tokens(config: Config, per_step: int, sequences: SequenceStream, resumed: Checkpoint | None) -> list[list[str]]:
    """Tokens of the run, and how often the data is read; steps before a checkpoint may have seen others."""
    on_disk, done, seen, since = sequences.tokens_on_disk, 0, 0, ""
    if resumed:
        done, seen = resumed.step, resumed.facts.tokens_seen
    left = per_step * (config.train.steps - done)
    of_this_data = seen + left
    if resumed and data_differences(resumed, sequences.fingerprint()):
        of_this_data, since = left, f" from step {done} on"
    return [
        ["tokens per step, in all", f"{per_step:,}, {seen + left:,}"],
        ["training data", f"{on_disk:,} tokens ({of_this_data / on_disk:.2f} epochs{since})"],
    ]
