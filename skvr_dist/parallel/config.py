"""The `parallel:` section: how a run is laid out over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from skvr_dist.section import Section


class ParallelConfig(Section):
    """Pipeline stages and ZeRO; data-parallel replicas are what the world size leaves."""

    pipeline: int = Field(default=1, gt=0)
    """Pipeline stages."""
    stage_layers: list[int] | None = None
    """Layers of each stage, by hand; null balances them by cost (`skvr_dist.parallel.partition`)."""
    zero_stage: Literal[0, 1] = 1
    """ZeRO stage: 0 replicates the optimizer state over data-parallel replicas, 1 shards it."""
