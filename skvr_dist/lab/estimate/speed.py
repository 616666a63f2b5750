"""The time of a step and its MFU for given rates: what must be computed and carried, and how long that takes at best.

A stage's micro-batch takes its operations at a share of the peak, and the operations of its tensor-parallel ranks;
messages between stages travel meanwhile. 1F1B takes as long as micro-batches + stages - 1 of the slowest stage. Then
gradients are reduced over the replicas (with ZeRO-2 and 3 in every micro-batch), and nothing overlaps with that. The
update, reading data and launching kernels are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from skvr_dist.lab.estimate.rank import MicroBatch, RankSizes
from skvr_dist.lab.estimate.traffic import Traffic
from skvr_dist.model.operations import head_operations, layer_operations
from skvr_dist.train.mfu import BF16_PEAKS

_GEMM_SHARE = 0.6  # of the peak; an assumption, `--efficiency` sets another


@dataclass(frozen=True)
class Rates:
    """What one GPU and its links can do.

    Args:
        tflops: peak of dense bf16 matrix products, 1e12 operations per second.
        host_gbytes: bytes per second to GPUs of the same host, one way, in 1e9.
        network_gbytes: the same to GPUs of other hosts.
        memory_gib: what a process can use of the GPU's memory.
        efficiency: share of the peak that matrix products and attention reach.
    """

    tflops: float
    host_gbytes: float
    network_gbytes: float
    memory_gib: float
    gpus_per_host: int = 8
    efficiency: float = _GEMM_SHARE


PRESETS = {
    "h100": Rates(tflops=BF16_PEAKS["H100 80GB HBM3"], host_gbytes=450, network_gbytes=50, memory_gib=78),
    "h200": Rates(tflops=BF16_PEAKS["H200"], host_gbytes=450, network_gbytes=50, memory_gib=139),
    "a100": Rates(tflops=BF16_PEAKS["A100"], host_gbytes=300, network_gbytes=25, memory_gib=78),
}
"""SXM cards of 80, 141 and 80 GB. Peaks are those of a run's own MFU (`skvr_dist.train.mfu`); NVLink is half of the
data sheets' 900 and 600 GB/s, which count both ways; the network is 400 (A100: 200) Gbit/s for each GPU, as in NVIDIA's
DGX."""


@dataclass(frozen=True)
class Speed:
    """Predicted, not measured."""

    step_seconds: float
    mfu: float
    bubble: float
    """Share of the pipeline's time in which the slowest stage waits."""
    computing_seconds: float
    """Of the slowest stage in a step, without bubble."""
    tensor_seconds: float
    messages_seconds: float
    """Per step; only what exceeds the computing, and the first and the last hops, count."""
    replicas_seconds: float

    @property
    def costs(self) -> dict[str, float]:
        """Seconds of a step that are not computing, by what they are spent on."""
        computing = self.computing_seconds
        return {
            "bubble": (computing + self.tensor_seconds) * self.bubble / (1 - self.bubble),
            "tensor-parallel bandwidth": self.tensor_seconds,
            "bandwidth between replicas": self.replicas_seconds,
            "bandwidth between stages": max(0.0, self.messages_seconds - computing - self.tensor_seconds),
        }


def operations(rank: RankSizes, row: MicroBatch, *, with_recomputation: bool) -> float:
    """Floating-point operations of both passes of a micro-batch on one rank; keys and values nobody reads cost none."""
    checkpointing = rank.config.parallel.activation_checkpointing
    layer = layer_operations(rank.widths, rank.tokens, rank.config.data.sequence_length)
    attention = sum(n for name, n in layer.projections.items() if "self_attn" in name) + layer.scores // 2  # causal
    total = 0.0
    for number in rank.layers:
        whole = sum(layer.projections.values()) + layer.scores // 2 + sum(layer.kv.values()) * (number in row.read)
        total += 3 * whole
        if with_recomputation and checkpointing.covers("layer", number):
            total += whole
        elif with_recomputation and checkpointing.covers("attention", number):
            total += attention
    return total + (3 * head_operations(rank.widths, rank.tokens) if rank.is_last else 0)


def predict(ranks: Sequence[RankSizes], rows: Sequence[Sequence[MicroBatch]], traffic: Sequence[Traffic],
            rates: Rates) -> Speed:  # fmt: skip
    """The speed of a run.

    Args:
        ranks: one of each stage.
        rows: some micro-batches of each stage.
        traffic: mean bytes of a step of each stage.
    """
    first = ranks[0]
    micro_batches, stages = first.micro_batches, first.stages
    peak = rates.tflops * 1e12
    needed = [mean(operations(rank, row, with_recomputation=False) for row in part)
              for rank, part in zip(ranks, rows, strict=True)]  # fmt: skip
    done = [mean(operations(rank, row, with_recomputation=True) for row in part)
            for rank, part in zip(ranks, rows, strict=True)]  # fmt: skip
    computing = [each * micro_batches / (peak * rates.efficiency) for each in done]
    tensor = [_collective_seconds(each, "tensor", first.tensor, _tensor_link(first, rates)) for each in traffic]
    replicas = [_collective_seconds(each, "replicas", first.replicas, _replica_link(first, rates)) for each in traffic]
    messages = [_message_seconds(each, rates.host_gbytes if first.gpus <= rates.gpus_per_host else rates.network_gbytes)
                for each in traffic]  # fmt: skip
    per_stage = [max(c + t, m) for c, t, m in zip(computing, tensor, messages, strict=True)]
    slowest = max(range(stages), key=lambda stage: per_stage[stage])
    hops = 2 * max(messages) / micro_batches * (stages - 1) / 2
    seconds = per_stage[slowest] * (micro_batches + stages - 1) / micro_batches + hops + max(replicas)
    return Speed(
        step_seconds=seconds,
        mfu=sum(needed) * micro_batches / stages / (seconds * peak),
        bubble=(stages - 1) / (micro_batches + stages - 1),
        computing_seconds=computing[slowest],
        tensor_seconds=tensor[slowest],
        messages_seconds=messages[slowest],
        replicas_seconds=max(replicas),
    )


def _tensor_link(rank: RankSizes, rates: Rates) -> float:
    return rates.host_gbytes if rank.tensor <= rates.gpus_per_host else rates.network_gbytes


def _replica_link(rank: RankSizes, rates: Rates) -> float:
    inside = rank.tensor * rank.replicas <= rates.gpus_per_host
    return rates.host_gbytes if inside else rates.network_gbytes


def _collective_seconds(traffic: Traffic, link: str, ranks: int, gbytes: float) -> float:
    """Of ring algorithms, by what a rank must send."""
    sent = {
        "all_reduce": 2 * (ranks - 1) / ranks,
        "all_gather": ranks - 1,
        "reduce_scatter": (ranks - 1) / ranks,
    }
    return sum(sent[name] * size for (where, name), size in traffic.items() if where == link) / (gbytes * 1e9)


def _message_seconds(traffic: Traffic, gbytes: float) -> float:
    """Of the busier direction: what is sent and what is received travel at once."""
    ways = [sum(size for (link, name), size in traffic.items() if link in ("forwards", "backwards") and name == way)
            for way in ("send", "receive")]  # fmt: skip
    return max(ways) / (gbytes * 1e9)
