"""What a rank holds at most while its stage is built: with ZeRO-3 its part of the weights and one whole one."""

from __future__ import annotations

from typing import Any

from skvr_dist.config.tree import Config
from skvr_dist.lab.verify.cases import Case
from skvr_dist.lab.verify.ranks import run_ranks


def configured(precision: str) -> Config:
    config = Case("DP2 ZeRO-3", "uniform", precision=precision).config()
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def build(precision: str) -> dict[str, Any]:
    """Bytes of tensors while the stage of this rank is built."""
    from skvr_dist.lab.virtual.memory import LiveMemory
    from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json
    from skvr_dist.parallel.engine.stage import StageModule
    from skvr_dist.parallel.mesh import Mesh

    config = configured(precision)
    mesh = Mesh.build(config.parallel, config.model)
    options = deepspeed_json(config, mesh.world_size)
    with LiveMemory() as memory:
        stage = StageModule(config.model, config.parallel, mesh, config.train.seed, options)
    sizes = [p.ds_numel for p in stage.parameters()]
    return {"peak": memory.peak, "held": memory.held, "largest": max(sizes), "all": sum(sizes)}


def test_zero_3_never_holds_the_weights_of_other_replicas() -> None:
    for precision, size in (("fp32", 4), ("bf16", 2)):
        for rank in run_ranks(2, build, precision):
            assert rank["held"] <= 1.05 * size * rank["all"] / 2
            # Drawn whole in fp32, then in the precision of the run, from which this rank's part is taken.
            print(precision, rank)
            assert rank["peak"] <= rank["held"] + (4 + size) * rank["largest"] + 2**16
