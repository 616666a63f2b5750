"""Activation checkpointing: what is computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch.utils.checkpoint import checkpoint

from skvr_dist.section import Section


class ActivationCheckpointing(Section):
    """What a decoder computes again in the backward pass."""

    recompute: Literal["none", "layer", "attention"] = "none"
    """`layer`: whole layers; `attention`: queries, attention and its output projection, but not keys and values."""
    every: int = Field(default=1, gt=0)
    """Recompute in every k-th layer only, counted over the whole decoder."""

    def covers(self, part: str, layer: int) -> bool:
        """Whether that part (layer or attention) of that layer is computed again."""
        return self.recompute == part and layer % self.every == 0


def run(function: Callable[..., Any], *args: Any, again: bool) -> Any:
    """`function(*args)`; with `again`, only its inputs are kept, and it runs again in the backward pass.

    Everything that needs a gradient must be an argument or a result. The reentrant form of checkpointing loses the
    gradient of a donor that reaches the function in any other way, silently.
    """
    if again and torch.is_grad_enabled():
        # Nothing random runs inside: the routing is an argument.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
