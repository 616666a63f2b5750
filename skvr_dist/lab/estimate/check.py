"""Compares the closed forms with virtual ranks, which build the real engine and train on the CPU of this machine."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from skvr_dist.config.load import validate_config
from skvr_dist.config.tree import Config
from skvr_dist.lab.estimate.memory import peak_memory
from skvr_dist.lab.estimate.rank import RankSizes
from skvr_dist.lab.estimate.traffic import Traffic, step_traffic
from skvr_dist.lab.verify.ranks import run_alone
from skvr_dist.lab.virtual.memory import LiveMemory
from skvr_dist.lab.virtual.rank import join_made_up_world
from skvr_dist.lab.virtual.record import Operation, Recorder
from skvr_dist.train.plans import plan_of_step

MEMORY_BOUND = 0.05
"""The largest relative error of the predicted peak."""
_STEP = 1
"""The step that is measured, from 0: the first one makes the optimizer's state."""

_FEW_NUMBERS = ("host_group", "norm", "has_overflow", "model_parallel_all_reduce")
"""In whose operations only norms, flags, counters or the plan travel."""

_SHAPE: dict[str, Any] = {
    "architecture": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "qk_norm": True,
    "tie_word_embeddings": False,
}
_NO_DATA = {"train": "-", "validation": "-", "tokenizer": "-"}
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"architecture": "qwen2", "qk_norm": False, "attention_bias": True},
    "llama": {"architecture": "llama", "qk_norm": False, "attention_bias": True},
}


@dataclass(frozen=True)
class Case:
    """A configuration that is estimated and measured."""

    name: str
    gpus: int
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    family: str = "qwen3"
    tied: bool = False
    policy: str = "uniform"
    zero: dict[str, Any] = field(default_factory=dict)
    sequence: int = 64
    draws_per: str = "micro_batch"
    attention: str = "sdpa"

    def config(self) -> Config:
        """The configuration of a run; its data sets are not opened."""
        random = {"cross_layer_prob": 0.6, "draws_per": self.draws_per} if self.policy != "none" else {}
        routing = {"policy": self.policy, **random}
        zero = {"reduce_bucket_size": 70_000, **self.zero}
        return validate_config(
            {
                "model": _SHAPE
                | _FAMILIES[self.family]
                | {"tie_word_embeddings": self.tied, "attention": self.attention},
                "routing": routing,
                "parallel": self.parallel,
                "data": {**_NO_DATA, "sequence_length": self.sequence, "lanes": 32},
                "train": {
                    "output_dir": "-",
                    "steps": 100,
                    "global_batch_size": 32,
                    "micro_batch_size": 2,
                    "precision": self.precision,
                    "learning_rate": 1e-3,
                },
                "deepspeed": {"zero_optimization": zero},
            }
        )


_LAYER = {"activation_checkpointing": {"recompute": "layer"}}
_ATTENTION = {"activation_checkpointing": {"recompute": "attention"}}
_EVERY_2ND = {"activation_checkpointing": {"recompute": "layer", "every": 2}}
_PARTITION_ALL = {"stage3_param_persistence_threshold": 0}
_FETCH_TWICE = {**_PARTITION_ALL, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
_SPLIT = {"tensor": 2, "sequence_parallel": True, "pipeline": 2}
_FROM_ARENA: dict[str, Any] = {"draws_per": "sequence", "attention": "routed"}
CASES = (
    Case("single, ZeRO-0", 1, {"zero_stage": 0}),
    Case("PP2, ZeRO-0", 2, {"pipeline": 2, "zero_stage": 0}, policy="strategy"),
    Case("PP4 x DP2, ZeRO-1", 8, {"pipeline": 4}),
    Case("PP4 x DP2, ZeRO-1, bf16", 8, {"pipeline": 4}, "bf16"),
    Case("DP4, ZeRO-2", 4, {"zero_stage": 2}, tied=True),
    Case("DP4, ZeRO-2, bf16", 4, {"zero_stage": 2}, "bf16", policy="none"),
    Case("PP2 x DP2, ZeRO-3", 4, {"pipeline": 2, "zero_stage": 3}, zero=_PARTITION_ALL),
    Case("PP2 x DP2, ZeRO-3, tied", 4, {"pipeline": 2, "zero_stage": 3}, tied=True, zero=_PARTITION_ALL),
    Case("DP2, ZeRO-3, small weights kept", 2, {"zero_stage": 3}),
    Case("DP4, ZeRO-3, bf16, fetched twice", 4, {"zero_stage": 3}, "bf16", zero=_FETCH_TWICE),
    Case("TP2, ZeRO-0, llama", 2, {"tensor": 2, "zero_stage": 0}, family="llama"),
    Case("TP2 SP x PP2, bf16", 4, _SPLIT, "bf16"),
    Case("TP4 SP x PP2 x DP2, llama", 16, {"tensor": 4, "sequence_parallel": True, "pipeline": 2}, family="llama"),
    Case("TP2 x PP4 x DP2, bf16, tied, qwen2", 16, {"tensor": 2, "pipeline": 4}, "bf16", "qwen2", tied=True),
    Case("TP4 x PP2 x DP4, tied", 32, {"tensor": 4, "pipeline": 2}, tied=True),
    Case("PP4, layers recomputed", 4, {"pipeline": 4, **_LAYER}),
    Case("PP2 x DP2, bf16, layers recomputed", 4, {"pipeline": 2, **_LAYER}, "bf16"),
    Case("TP2 SP x PP2, layers recomputed", 4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2, **_LAYER}),
    Case("TP2 x PP2, attention recomputed", 4, {"tensor": 2, "pipeline": 2, **_ATTENTION}),
    Case("TP2 SP, attention recomputed", 2, {"tensor": 2, "sequence_parallel": True, **_ATTENTION}),
    Case("PP4 x DP16, ZeRO-1, bf16", 64, {"pipeline": 4}, "bf16"),
    Case("PP2, every 2nd layer recomputed", 2, {"pipeline": 2, **_EVERY_2ND}),
    Case("PP4 x DP2, ZeRO-1, draws per sequence", 8, {"pipeline": 4}, draws_per="sequence"),
    Case("TP2 SP x PP2, bf16, draws per sequence", 4, _SPLIT, "bf16", draws_per="sequence"),
    Case("PP4, layers recomputed, draws per sequence", 4, {"pipeline": 4, **_LAYER}, draws_per="sequence"),
    Case("PP4 x DP4, ZeRO-1, from an arena", 16, {"pipeline": 4}, **_FROM_ARENA),
    Case("PP2 x DP4, layers recomputed, from an arena", 8, {"pipeline": 2, **_LAYER}, **_FROM_ARENA),
    Case("TP2 SP x PP2 x DP4, bf16, from an arena", 16, _SPLIT, "bf16", **_FROM_ARENA),
    Case("DP2, ZeRO-3, layers recomputed", 2, {"zero_stage": 3, **_LAYER}, zero=_PARTITION_ALL),
    Case("PP2 x DP2, ZeRO-3, layers recomputed", 4, {"pipeline": 2, "zero_stage": 3, **_LAYER}, zero=_PARTITION_ALL),
    Case("DP2, ZeRO-3, layers recomputed, fetched twice", 2, {"zero_stage": 3, **_LAYER}, zero=_FETCH_TWICE),
    # So few tokens that weights, buckets and the update decide.
    Case("PP2, ZeRO-0, 8 tokens", 2, {"pipeline": 2, "zero_stage": 0}, sequence=4),
    Case("PP2 x DP2, ZeRO-1, 8 tokens", 4, {"pipeline": 2}, sequence=4),
    Case("PP2 x DP2, ZeRO-1, bf16, 8 tokens", 4, {"pipeline": 2}, "bf16", sequence=4),
    Case("DP4, ZeRO-2, bf16, 8 tokens", 4, {"zero_stage": 2}, "bf16", sequence=4),
    Case("DP4, ZeRO-3, 8 tokens", 4, {"zero_stage": 3}, sequence=4),
)  # fmt: skip
"""What `tools/verify.py estimate` compares."""


@dataclass(frozen=True)
class Measured:
    """What a virtual rank did in a step."""

    peak_bytes: int
    traffic: Traffic


@dataclass(frozen=True)
class Comparison:
    """One rank, estimated and measured."""

    case: str
    stage: int
    estimated_bytes: int
    measured_bytes: int
    moment: str
    traffic: Traffic
    differing: list[str]
    """Operations whose bytes are not those that were measured."""

    @property
    def error(self) -> float:
        """Relative error of the estimated peak."""
        return self.estimated_bytes / self.measured_bytes - 1

    @property
    def is_met(self) -> bool:
        """Whether bytes are exact and memory is within the bound."""
        return not self.differing and abs(self.error) <= MEMORY_BOUND


def compare(case: Case) -> Iterator[Comparison]:
    """Estimate and measure the first rank of every stage that differs: the first, the second and the last."""
    config = case.config()
    stages = config.parallel.pipeline
    for stage in sorted({0, min(1, stages - 1), stages - 1}):
        rank = RankSizes(config, case.gpus, stage)
        rows = rank.rows(plan_of_step(config, _STEP))
        memory, traffic = peak_memory(rank, rows, "cpu"), step_traffic(rank, rows)
        first = stage * rank.replicas * rank.tensor
        measured: Measured = run_alone(measure_rank, config, first, case.gpus)
        differing = [
            f"{' '.join(kind)}: {traffic.get(kind, 0)} bytes, {measured.traffic.get(kind, 0)} measured"
            for kind in sorted(traffic.keys() | measured.traffic.keys())
            if traffic.get(kind) != measured.traffic.get(kind)
        ]
        yield Comparison(case.name, stage, memory.total, measured.peak_bytes, memory.moment, traffic, differing)


def measure_rank(config: Config, rank: int, world_size: int) -> Measured:
    """Train as one rank of a made-up world, and measure one step. For a process of its own."""
    logging.disable(logging.WARNING)  # DeepSpeed warns of objects that hide their tensors, which is meant
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what memory it sees
        return _measure(config, rank, world_size)


def _measure(config: Config, rank: int, world_size: int) -> Measured:
    import torch

    from skvr_dist.data.batch import MicroBatch
    from skvr_dist.parallel.mesh import Mesh
    from skvr_dist.train.build import build_engine
    from skvr_dist.train.plans import plan_stream

    join_made_up_world(rank, world_size)
    shape = config.train.micro_batch_size, config.data.sequence_length + 1
    with Recorder(make_up=True) as recorder, LiveMemory() as memory:
        mesh = Mesh.build(config.parallel, config.model)
        engine = build_engine(config, mesh)
        if config.model.attention == "routed":
            _let_kernels_give_zeros()
        plans = plan_stream(config, mesh, 0)
        micro_batches = config.num_micro_batches // mesh.dp_size
        for _ in range(_STEP + 1):
            gc.collect()
            started = len(recorder.events)
            memory.reset_peak()
            batches = (MicroBatch.of(torch.zeros(shape, dtype=torch.long)) for _ in range(micro_batches))
            engine.train_step(batches, plans.next())
    operations = [event for event in recorder.events[started:] if isinstance(event, Operation)]
    return Measured(memory.peak, _by_link(operations, mesh.pp_size, mesh.tp_size, world_size))


_OUTPUTS = {"write": (), "unwrite": (2, 3), "forward": (2, 3), "queries": (4, 6), "keys": ()}
"""Which arguments of the kernels of `skvr_kernels` are made by them."""


def _let_kernels_give_zeros() -> None:
    """Let nothing be computed from arenas: Triton's interpreter would take minutes, and memory is all that counts."""
    from skvr_kernels import attention

    class Kernel:
        def __init__(self, outputs: tuple[int, ...]) -> None:
            self._outputs = outputs

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self._run

        def _run(self, *args: Any, **options: Any) -> None:
            for number in self._outputs:
                args[number].zero_()

    for name, outputs in _OUTPUTS.items():
        setattr(attention, f"{name}_kernel", Kernel(outputs))


def _by_link(operations: list[Operation], stages: int, tensor: int, world_size: int) -> Traffic:
    """Bytes by kind of link and operation, without scalars and plans."""
    by_link: Traffic = {}
    ranks_of_stage = world_size // stages
    for each in operations:
        if len(each.ranks) == 1 or any(name in each.where for name in _FEW_NUMBERS):
            continue
        if each.peer is not None:
            mine = next(rank for rank in each.ranks if rank != each.peer)
            forwards = (each.peer > mine) is (each.name == "send")
            link = "forwards" if forwards else "backwards"
        elif each.ranks[-1] // ranks_of_stage != each.ranks[0] // ranks_of_stage:
            link = "tied"
        else:
            link = "replicas" if each.ranks[1] - each.ranks[0] == tensor else "tensor"
        key = link, each.name
        by_link[key] = by_link.get(key, 0) + each.bytes
    return by_link
