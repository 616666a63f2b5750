"""Activation checkpointing: what is computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run(function: Callable[..., Any], *args: Any, again: bool) -> Any:
    """`function(*args)`; with `again`, only its inputs are kept, and it runs again in the backward pass.

    Everything that needs a gradient must be an argument or a result. The reentrant form of checkpointing loses the
    gradient of a donor that reaches the function in any other way, silently.
    """
    if again and torch.is_grad_enabled():
        # Nothing random runs inside: the routing is an argument.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)
