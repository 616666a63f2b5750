"""The `parallel:` section: how a run is laid out over ranks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from skvr_dist.section import Section

# Every rank compares every plan with its own draw by now.
_RETIRED = ("verify_plan_every_steps",)


class ActivationCheckpointing(Section):
    """What a decoder computes again in the backward pass."""

    recompute: Literal["none", "layer", "attention"] = "none"
    """`layer`: whole layers; `attention`: queries, attention and its output projection, but not keys and values."""
    every: int = Field(default=1, gt=0, le=10_000)
    """Recompute in every k-th layer only, counted over the whole decoder."""

    def covers(self, part: str, layer: int) -> bool:
        """Whether that part (layer or attention) of that layer is computed again."""
        return self.recompute == part and layer % self.every == 0


class ParallelConfig(Section):
    """Stages, tensor-parallel ranks and ZeRO; data-parallel replicas are what the world size leaves."""

    pipeline: int = Field(default=1, gt=0, le=10_000)
    """Pipeline stages."""
    stage_layers: list[int] | None = None
    """Layers of each stage, by hand; null balances them by cost (`skvr_dist.parallel.split`)."""
    tensor: int = Field(default=1, gt=0, le=10_000)
    """Tensor-parallel ranks that share each layer."""
    sequence_parallel: bool = False
    """Also split the sequence over those ranks, between their regions."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What data-parallel replicas share: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters. A single
    replica that trains in fp32 without offloading has nothing to share, and takes 0 for 1 and 2."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    compile: Literal["auto", "inductor", "aot_eager", "off"] = "auto"
    """Whether layers are compiled (`skvr_dist.model.compiled`): `auto` takes `inductor` on GPUs and `off` on CPUs;
    `aot_eager` makes the same graphs and runs them with PyTorch's own kernels, to find out where a fault is from."""
    timeout_seconds: float = Field(default=600.0, ge=1, le=10**7)
    """Longest wait for another rank; then the run ends and names it."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired_keys(cls, raw: Any) -> Any:
        """Configurations that were written before a key went still load."""
        return {key: value for key, value in raw.items() if key not in _RETIRED} if isinstance(raw, dict) else raw
