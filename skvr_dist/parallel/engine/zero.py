"""ZeRO with routing, in DeepSpeed's PipelineEngine, which refuses ZeRO-2 and ZeRO-3.

Nothing in their optimizers forbids it. What is missing is done here:

* both reduce gradients in every backward pass, and must be told which one it is in the step, and which is the last;
* ZeRO-2 fills its buckets in the order in which gradients appear. That order depends on the routing, which differs
  between replicas: they would add gradients of different parameters;
* ZeRO-3 compares the order of its modules over all ranks of the world, but stages hold different modules;
* the stages that share a tied embedding add its gradients up, where the optimizer will look for them: with ZeRO-3 in
  a partition, with ZeRO-1 in another place for each precision;
* those stages must hold the same weight after any number of steps, to the last bit.

What concerns the modules of a stage is done in `StageModule`: which parameters count in the gradient norm on which
rank, and that ZeRO-3 fetches a layer as one.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import engine as pipe_engine
from deepspeed.runtime.zero import Init, partitioned_param_coordinator
from torch.distributed import distributed_c10d

# Of those that this process has made: all ranks make them in the same order, so it tells those of one apart.
_ENGINES = itertools.count()

TiedWeights = list[tuple[torch.nn.Parameter, dist.ProcessGroup]]
"""Weights that the first and the last stage share, each with the group of its two ranks."""


@contextlib.contextmanager
def _accepting_every_zero_stage() -> Iterator[None]:
    """Let the constructor of PipelineEngine pass with ZeRO-2 and 3.

    Right after DeepSpeedEngine's constructor, which must know the real stage, it asserts that the stage is below
    `ZeroStageEnum.gradients`. That is the only use of this name in its module (0.19.8), so moving the bound while the
    constructor runs touches nothing else.
    """
    refused = pipe_engine.ZeroStageEnum
    pipe_engine.ZeroStageEnum = SimpleNamespace(gradients=refused.max_stage + 1)
    try:
        yield
    finally:
        pipe_engine.ZeroStageEnum = refused


class Partitioner:
    """Leaves this rank its part of a module's weights, for ZeRO-3, as DeepSpeed does with a model that is there whole.

    Called with one module after the other, by all replicas: they get the weights that the first of them has.

    Args:
        deepspeed_json: DeepSpeed's configuration.
        mpu: the groups of the pipeline, from `PipelineModule.mpu`.
    """

    def __init__(self, deepspeed_json: dict[str, Any], mpu: Any) -> None:
        self._deepspeed_json = deepspeed_json
        self._mpu = mpu
        self._partition: Callable[[Iterable[torch.nn.Parameter]], None] | None = None

    def __call__(self, module: torch.nn.Module) -> None:
        """Partition the weights of a module without children."""
        if self._partition:
            self._partition(module.parameters())
            return
        Init(
            module,
            data_parallel_group=self._mpu.get_data_parallel_group(),
            config_dict_or_path=self._deepspeed_json,
            mpu=self._mpu,
        )
        self._partition = next(module.parameters()).convert_to_zero_parameters  # type: ignore[attr-defined]


class ZeroPipelineEngine(pipe_engine.PipelineEngine):
    """DeepSpeed's PipelineEngine with any ZeRO stage, and with tied weights that stay equal; arguments are its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _accepting_every_zero_stage():
            super().__init__(*args, **kwargs)

    @property
    def reduces_in_backward(self) -> bool:
        """Whether each backward pass reduces its gradients over the replicas: with ZeRO-2 and 3."""
        return bool(self.zero_optimization_partition_gradients())

    def begin_backward(self, micro_batch: int, last: bool) -> None:
        """Prepare for the backward pass of one of a step's micro-batches, counted from 0 on this rank."""
        if self.reduces_in_backward:
            self.enable_backward_allreduce = True  # PipelineEngine turns it off, and reduces at the end of the step
            self._force_grad_boundary = last
            # ZeRO-2 counts up when the first gradient of the backward pass arrives, ZeRO-3 only after it.
            counted_up = 0 if self.zero_optimization_partition_weights() else 1
            self.optimizer.micro_step_id = micro_batch - counted_up

    def end_backward(self) -> None:
        """Undo what `begin_backward` set for one backward pass."""
        self._force_grad_boundary = False

    def sum_tied_gradients(self, weights: TiedWeights) -> None:
        """Add the gradients of tied weights up over the stages that share them.

        With ZeRO-3 they are partitions, already reduced over the replicas. The stages hold the same partition: the same
        weight over equally many replicas.
        """
        for weight, group in weights:
            if self.zero_optimization_partition_weights():
                gradient = self.optimizer.get_local_fp32_grad_for_param(weight)
                dist.all_reduce(gradient, group=group)
                self.optimizer.set_local_grad_for_param(gradient, weight)
            elif self.using_bf16_optimizer:
                dist.all_reduce(weight._hp_grad, group=group)  # type: ignore[attr-defined]
            elif self.zero_optimization():
                dist.all_reduce(self.optimizer.get_gradient_for_reduction(weight), group=group)
            else:
                dist.all_reduce(weight.grad, group=group)

    def copy_tied_weights(self, weights: TiedWeights) -> None:
        """Give the last stage the first one's tied weights.

        Each has stepped with the same gradient, but for the last bit: in which order the replicas are added up depends
        on where a weight lies among those of its stage. What is not made equal drifts apart.
        """
        for weight, group in weights:
            # With ZeRO-3 a rank holds its partition, and the whole of those that are too small to be shared out.
            for held in (weight.data, getattr(weight, "ds_tensor", None)):
                if held is not None and held.numel():
                    dist.broadcast(held, group=group, group_src=0)


def compare_module_order_within(stage: str) -> None:
    """Let ZeRO-3 compare its order of modules with the replicas of this stage and shard only.

    DeepSpeed broadcasts it from rank 0 to all ranks; over a pipeline that would compare different stages. Here the
    first of the replicas leaves its order in the store of the process group, which needs no connections between them.

    Args:
        stage: a name for what the replicas share, and nobody else.
    """
    place = f"module order/engine {next(_ENGINES)}/{stage}"
    store, number = dist.PrefixStore(place, distributed_c10d._get_default_store()), itertools.count()

    def require_same(numbers: list[int]) -> None:
        mine = hashlib.sha256(repr(numbers).encode()).hexdigest()
        if store.compare_set(str(next(number)), "", mine).decode() != mine:
            raise RuntimeError(f"the replicas of this stage run their modules in different orders: {numbers}")

    partitioned_param_coordinator.assert_ints_same_as_other_ranks = require_same


def reduce_layer_by_layer(optimizer: Any, layers: Iterable[torch.nn.Module]) -> None:
    """Let ZeRO-2 reduce the gradients of each layer together and in a fixed order.

    A layer's last gradient appears before the first of the layer below it, whatever the routing, so between layers the
    order is fixed already.
    """
    trained = {layer: [p for p in layer.parameters() if p.requires_grad] for layer in layers}
    layer_of = {parameter: layer for layer, parameters in trained.items() for parameter in parameters}
    reduce = optimizer.reduce_ready_partitions_and_remove_grads
    waiting: dict[torch.nn.Module, dict[torch.nn.Parameter, int]] = defaultdict(dict)

    def reduce_when_the_layer_is_complete(parameter: torch.nn.Parameter, group: int) -> None:
        layer = layer_of.get(parameter)
        if layer is None:
            reduce(parameter, group)
            return
        waiting[layer][parameter] = group
        if len(waiting[layer]) == len(trained[layer]):
            arrived = waiting.pop(layer)
            for each in trained[layer]:
                reduce(each, arrived[each])

    optimizer.reduce_ready_partitions_and_remove_grads = reduce_when_the_layer_is_complete
