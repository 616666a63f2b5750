"""One rank of a GPU run over the runtime that runs nothing: it builds the engine, trains two steps, counts the second.

    python -m skvr_dist.lab.gpu_dry.step MEASUREMENT.json OUTPUT.json

started by `skvr_dist.lab.gpu_dry.measure`, with the runtime preloaded. Weights are neither drawn nor copied.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from skvr_dist.config.load import validate_config
from skvr_dist.config.tree import Config
from skvr_dist.data.batch import MicroBatch
from skvr_dist.lab.gpu_dry.counters import LaunchesByPart, counting

GIB, MIB = 2**30, 2**20
DOCUMENTS, END = 4, 1
"""Documents of a sequence, and the token that ends each."""


def main() -> None:
    """Entry point."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    measure = {"engine": train_step, "decoder": decoder_step, "loss": loss_step}[asked["part"]]
    found = measure(validate_config(asked["config"]))
    Path(sys.argv[2]).write_text(json.dumps(found))
    os._exit(0)  # the compiler's own processes, and communicators of no network, would hold the end up


def train_step(config: Config) -> dict[str, Any]:
    """What the second step asks for, what the training loop reads after it included."""
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.plans import plan_stream

    start_process_group(timedelta(minutes=5))
    mesh = Mesh.build(config.parallel, config.model)
    with mock.patch("skvr_dist.model.decoder._draw"):
        engine = build_engine(config, mesh)
    engine.stopwatch = parts = LaunchesByPart()
    plans = plan_stream(config, mesh, 0)
    shape = config.num_micro_batches // mesh.dp_size, config.train.micro_batch_size, config.data.sequence_length + 1
    tokens = torch.zeros(shape, dtype=torch.long)
    tokens[:, :, :: config.data.sequence_length // DOCUMENTS] = END
    separate_at = END if config.data.documents == "separate" else None

    def step() -> None:
        engine.train_step((MicroBatch.of(each, separate_at) for each in tokens), plans.next())
        _ = engine.gradient_norm, engine.stopwatch.read()

    found = _second_of(step)
    return found | {"launches_by_instruction": parts.launches}


def decoder_step(config: Config) -> dict[str, Any]:
    """What a plain loop would ask for: the decoder without head and loss, forwards and backwards, and fused AdamW."""
    from skvr_dist.model.compiled import compile_layers, resolve_compile
    from skvr_dist.model.decoder import Decoder
    from skvr_dist.train.plans import plan_of_step

    with torch.device("meta"):
        decoder = Decoder(config.model).to(torch.bfloat16)
    decoder.to_empty(device="cuda")
    device = torch.device("cuda")
    if backend := resolve_compile(config.parallel.compile, device):
        compile_layers(decoder, backend, device)
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    tokens = torch.zeros(config.train.micro_batch_size, config.data.sequence_length, dtype=torch.long, device="cuda")

    def step() -> None:
        for donors in map(plan_of_step(config, 0).of_micro_batch, range(config.num_micro_batches)):
            hidden, _ = decoder.run_layers(decoder.embed(tokens), donors, {})
            decoder.norm(hidden).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return _second_of(step)


def loss_step(config: Config) -> dict[str, Any]:
    """What the loss of a micro-batch asks for, and takes beside the gradients of hidden states and head."""
    from skvr_dist.model.compiled import resolve_compile
    from skvr_dist.model.loss import Objective, linear_loss

    backend = resolve_compile(config.parallel.compile, torch.device("cuda"))
    tokens, size = config.train.micro_batch_size * config.data.sequence_length, config.model.hidden_size
    with torch.device("cuda"):
        hidden = torch.empty(1, tokens, size, dtype=torch.bfloat16, requires_grad=True)
        head = torch.empty(config.model.vocab_size, size, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(1, tokens, dtype=torch.long)

    def step() -> None:
        hidden.grad = head.grad = None
        linear_loss(hidden, head, Objective(labels), backend=backend).total.backward()

    found = _second_of(step)
    own = hidden.nbytes + head.nbytes
    return found | {"loss_extra_mib": (found["peak_gib"] * GIB - 2 * own - labels.nbytes) / MIB}


def _second_of(step: Callable[[], None]) -> dict[str, Any]:
    """Counts, peak memory and seconds of a step that has been done once, which made and compiled what it needs."""
    started = time.perf_counter()
    step()
    first_seconds = time.perf_counter() - started
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with counting() as counts:
        step()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / GIB
    return {**asdict(counts), "peak_gib": peak, "first_step_seconds": first_seconds, "step_seconds": seconds}


if __name__ == "__main__":
    main()
