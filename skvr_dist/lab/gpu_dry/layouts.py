"""Layouts of several ranks over the runtime that runs nothing: what their ranks ask of NCCL, and in which order.

    python -m skvr_dist.lab.gpu_dry.layouts LAYOUT

is one rank of a layout of the quick matrix, with a launcher's variables and the runtime preloaded: two steps and an
evaluation between them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from skvr_dist.cluster.launcher import free_port
from skvr_dist.lab.gpu_dry.measure import environment, failure
from skvr_dist.lab.gpu_dry.order import RankLog, order_of
from skvr_dist.lab.verify.cases import LAYOUTS, Case, quick_matrix, varied

_SECONDS = 600
"""The longest that a layout's ranks may take; who has not ended then waits for another one."""


def layouts() -> list[str]:
    """Layouts of the quick matrix that have several ranks."""
    return [name for name in dict.fromkeys(case.layout for case in quick_matrix()) if LAYOUTS[name].ranks > 1]


def orders(names: Iterable[str], folder: Path) -> Iterator[dict[str, Any]]:
    """How the ranks of each layout talk.

    Args:
        folder: where `library.build` has built.

    Raises:
        UserError: a rank failed.
    """
    for name in names:
        with tempfile.TemporaryDirectory() as logs:
            late = _run(name, folder, Path(logs))
            parsed = [RankLog.parse(_asked(Path(logs), rank)) for rank in range(LAYOUTS[name].ranks)]
        order = asdict(order_of(parsed))
        order["stuck"] += [f"rank {rank} did not end within {_SECONDS} s" for rank in late]
        yield {"layout": name, "ranks": LAYOUTS[name].ranks, **order}


def _run(name: str, folder: Path, logs: Path) -> list[int]:
    """Run a layout's ranks; returns those that did not end."""
    port, count = free_port(), LAYOUTS[name].ranks
    processes = [_start(name, rank, port, folder, logs) for rank in range(count)]
    deadline, late = time.monotonic() + _SECONDS, []
    try:
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(rank)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        if rank not in late and process.returncode:
            said = _said(logs, rank).read_text(errors="replace")
            raise failure(f"rank {rank} of {name} ended with code {process.returncode}", said)
    return late


def _start(name: str, rank: int, port: int, folder: Path, logs: Path) -> subprocess.Popen[bytes]:
    count = LAYOUTS[name].ranks
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    variables = {key: str(value) for key, value in launched.items()}
    variables |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "SKVR_GPU_DRY_NCCL": str(logs / str(rank))}
    command = [sys.executable, "-m", "skvr_dist.lab.gpu_dry.layouts", name]
    with _said(logs, rank).open("wb") as said:
        return subprocess.Popen(command, env=environment(folder) | variables, stdout=said, stderr=said)


def _asked(logs: Path, rank: int) -> str:
    """What a rank has asked of NCCL; nothing if it has not come that far."""
    log = logs / str(rank)
    return log.read_text() if log.exists() else ""


def _said(logs: Path, rank: int) -> Path:
    """What a rank prints."""
    return logs / f"{rank}.txt"


def main() -> None:
    """Entry point of a rank."""
    from skvr_dist.parallel.engine.process_group import start_process_group
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.plans import plan_stream

    case = varied(Case(sys.argv[1]), "bf16")
    config = case.config()
    start_process_group(timedelta(seconds=_SECONDS))
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    plans = plan_stream(config, mesh, 0)
    first, second, *_ = case.micro_batches()
    own = slice(mesh.dp_rank, None, mesh.dp_size)
    engine.train_step(iter(first[own]), plans.next())
    engine.evaluate(first[own], range(config.model.num_hidden_layers))
    engine.train_step(iter(second[own]), plans.next())
    mesh.host_group.sum([0.0])  # rank 0 holds the store
    os._exit(0)  # communicators of no network would hold the end up


if __name__ == "__main__":
    main()
