"""What happens when ranks differ, get stuck or die: a sentence that names them, within a bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest
import torch.distributed as dist

from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.data.batch import MicroBatch
from skvr_dist.errors import RunInterrupted, UserError
from skvr_dist.lab.verify.cases import SHAPE, Case, batches
from skvr_dist.lab.verify.ranks import RankError, run_ranks
from skvr_dist.parallel import failure
from skvr_dist.parallel.mesh import Mesh
from skvr_dist.train.plans import plan_of_step

TIMEOUT = 5.0


def mesh_of_replicas() -> Mesh:
    return Mesh.build(ParallelConfig(), ModelConfig.model_validate(SHAPE))


def disagree() -> None:
    mesh = mesh_of_replicas()
    mesh.require_same({"first step": 4})
    mesh.require_same({"first step": 4 if mesh.rank < 2 else 0})


def test_ranks_that_disagree_stop() -> None:
    with pytest.raises(RankError, match="ranks 0 and 2 disagree on the first step: 4 and 0"):
        run_ranks(3, disagree)


def test_too_few_files_are_for_the_user_to_put_right() -> None:
    error = RuntimeError("[enforce fail at gloo/transport/tcp/loop.cc:48] pipe: Too many open files")
    for naming in (failure.naming_the_meeting(0), failure.naming_the_operation(cast(Mesh, None), "a sum")):
        with pytest.raises(UserError, match="a rank needs more; raise that before the start") as raised, naming:
            raise error
        assert raised.value.exit_code == 2


def receive_another_plan() -> str:
    from skvr_dist.train.plans import plan_stream

    mesh = mesh_of_replicas()
    plans = plan_stream(Case("DP2 ZeRO-1", "none").config(), mesh, first_step=0)
    plans.next()
    plans._under_way[0].arrive()
    if mesh.rank == 0:
        plans.next()
        return ""
    plans._under_way[0].received[3, 4] = 2
    with pytest.raises(UserError) as raised:
        plans.next()
    return str(raised.value)


def test_a_rank_with_another_plan_is_named() -> None:
    _, message = run_ranks(2, receive_another_plan)
    assert message.startswith(
        "routing plan of step 2, micro-batch 3: rank 1 draws that layer 4 reads layer 4, rank 0 sent layer 2"
    )


def train_until(rank: int, fate: str, through: Path) -> str:
    """Train on 4 ranks; after the first step one rank gets stuck or dies. What the others say.

    In the folder `through` each of the others leaves a file at its end, until which the one is stuck.
    """
    from skvr_dist.parallel.engine.process_group import use_timeout
    from skvr_dist.train.build import build_engine

    use_timeout(timedelta(seconds=TIMEOUT))
    config = Case("PP2xDP2 ZeRO-1").config()
    mesh = Mesh.build(config.parallel, config.model)
    engine = build_engine(config, mesh)
    first, second, _ = batches(3)
    engine.train_step(map(MicroBatch.of, first[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, 0))
    dist.barrier()
    if mesh.rank == rank:
        if fate == "dies":
            os._exit(0)
        if fate == "is stopped":  # its store, which the others ask, does not answer either
            others = f"until [ $(ls {through} | wc -l) = 3 ]; do sleep 0.1; done; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", others])
            os.kill(os.getpid(), signal.SIGSTOP)
        while len(list(through.iterdir())) < 3:
            time.sleep(0.1)
        return ""
    failure._ROLL_CALL_SECONDS, failure._SECONDS_FOR_THE_STORE = 4.0, 4.0
    with pytest.raises(RunInterrupted) as raised:
        engine.train_step(map(MicroBatch.of, second[mesh.dp_rank :: mesh.dp_size]), plan_of_step(config, 1))
    (through / str(mesh.rank)).touch()
    return str(raised.value)


@pytest.mark.parametrize(("rank", "fate"), [(2, "is stuck"), (1, "dies"), (0, "is stopped")])
def test_a_missing_rank_is_named(rank: int, fate: str, tmp_path: Path) -> None:
    results = run_ranks(4, train_until, rank, fate, tmp_path, may_die=fate == "dies")
    survivors = [result for other, result in enumerate(results) if other != rank]
    for other, message in zip([r for r in range(4) if r != rank], survivors, strict=True):
        assert message.startswith(f"rank {other} (stage ")
        assert f"no sign of life from rank {rank}" in message
    assert any(" of micro-batch " in message for message in survivors)
