"""The `metrics:` section: what a run says about itself."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from skvr_dist.section import Section

WRITERS = ("jsonl", "tensorboard", "wandb")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class MetricsConfig(Section):
    """What a run says about itself ([metrics.md](metrics.md))."""

    writers: list[str] = Field(default=["jsonl", "tensorboard"])
    """Who takes the records: `jsonl` (metrics.jsonl), `tensorboard`, `wandb`, or the dotted name of a callable.

    A callable is called with (step, values). One that fails in the middle is left out, and the run goes on."""
    wandb_project: str = Field(default="skvr_dist", min_length=1)
    """Project of Weights & Biases; its own variables (WANDB_MODE, WANDB_ENTITY) decide the rest."""
    layer_gradient_norms_every_steps: int | None = Field(default=None, gt=0, le=10**9)
    """Steps between two measurements of every layer's gradient norm; null: never.

    Each puts the gradients of one weight after the other together over the replicas."""

    @field_validator("writers")
    @classmethod
    def _each_is_known(cls, writers: list[str]) -> list[str]:
        for number, name in enumerate(writers):
            if name not in WRITERS and not _DOTTED.fullmatch(name):
                raise ValueError(
                    f"{name!r} is none of {', '.join(WRITERS)}, and no dotted name of a callable such as "
                    f"my_package.my_module.write"
                )
            if name in writers[:number]:
                raise ValueError(f"{name} is there twice; leave one out")
        return writers
