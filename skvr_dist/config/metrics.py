"""The `metrics:` section: what a run says about itself."""

from __future__ import annotations

from pydantic import Field

from skvr_dist.section import Section


class MetricsConfig(Section):
    """What a run says about itself ([metrics.md](metrics.md))."""

    layer_gradient_norms_every_steps: int | None = Field(default=None, gt=0, le=10**9)
    """Steps between two measurements of every layer's gradient norm; null: never.

    Each puts the gradients of one weight after the other together over the replicas."""
