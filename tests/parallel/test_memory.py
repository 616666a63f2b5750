"""What a rank holds: with ZeRO-3 while its stage is built, under sequence parallelism for the backward pass."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch

from skvr_dist.lab.verify.cases import BATCH, SEQUENCE, SHAPE, Case
from skvr_dist.lab.verify.ranks import run_ranks

SIZES = {"fp32": 4, "bf16": 2}


def measure() -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    return {precision: bytes_while_building(precision) for precision in SIZES}, kept_for_the_backward_pass()


def bytes_while_building(precision: str) -> dict[str, int]:
    """Bytes of tensors, and elements of the weights."""
    from skvr_dist.lab.virtual.memory import LiveMemory
    from skvr_dist.parallel.engine.deepspeed_json import deepspeed_json
    from skvr_dist.parallel.engine.stage import StageModule
    from skvr_dist.parallel.mesh import Mesh

    config = Case("DP2 ZeRO-3", precision=precision).config()
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}
    model = config.model.model_copy(update=sizes)
    mesh = Mesh.build(config.parallel, model)
    options = deepspeed_json(config, mesh.world_size)
    with LiveMemory() as memory:
        stage = StageModule(model, config.parallel, mesh, config.train.seed, options, config.data.sequence_length)
        mesh.host_group.sum([0.0])  # gloo's threads let go of what they sent before
        gc.collect()
    elements = [parameter.ds_numel for parameter in stage.parameters()]
    return {"peak": memory.peak, "held": memory.held, "largest": max(elements), "all": sum(elements)}


def kept_for_the_backward_pass() -> list[tuple[int, ...]]:
    """Shapes of the tensors that layers keep, weights aside."""
    from skvr_dist.model.decoder import Decoder
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.parallel.tensor import TensorParallelModules

    config = Case("TP2 SP").config()
    mesh = Mesh.build(config.parallel, config.model)
    decoder = Decoder(config.model, modules=TensorParallelModules(config.model, mesh, True))
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    hidden = decoder.embed(torch.zeros(BATCH, SEQUENCE, dtype=torch.long))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.run_layers(hidden, [[0, 1, 0, 3, 2]], {})
    return list(kept.values())


def test_a_rank_holds_its_own_part() -> None:
    for building, kept in run_ranks(2, measure):
        for precision, found in building.items():
            size = SIZES[precision]
            assert found["held"] <= 1.05 * size * found["all"] / 2
            # Drawn whole in fp32, then in the precision of the run, of which this rank takes its part.
            assert found["peak"] <= found["held"] + (4 + size) * found["largest"] + 2**16
        hidden = SHAPE["hidden_size"]
        assert not [shape for shape in kept if math.prod(shape) == BATCH * SEQUENCE * hidden and shape[-1] == hidden]
        assert kept.count((BATCH, SEQUENCE // 2, hidden)) >= 2 * SHAPE["num_hidden_layers"]
