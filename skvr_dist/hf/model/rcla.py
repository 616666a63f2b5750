"""Training a model of transformers with stochastic KV routing, in any training loop.

The donors of a forward pass are a function of (seed, number of the pass, rank); under DeepSpeed's ZeRO, where all
ranks must use parameters and reduce gradients in the same order, of (seed, number of the pass). Every parameter gets
a gradient in every pass, zero where routing left it out, as DDP and FSDP expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from skvr_dist.errors import UserError
from skvr_dist.hf.model.causal_lm import require_working_transformers
from skvr_dist.hf.model.layers import route
from skvr_dist.model.decoder import zero_gradients
from skvr_dist.routing import POLICIES, RoutingConfig, draw_plan

_POLICIES = [name for name, policy in POLICIES.items() if policy.parameters == ("cross_layer_prob",)]
"""The policies whose only parameter is `cross_layer_prob`, which `enable_rcla` takes."""


class DonorDraw:
    """Draws the donors of each forward pass of a model in turn."""

    def __init__(self, model: nn.Module, routing: RoutingConfig, seed: int) -> None:
        self.model, self.routing, self.seed = model, routing, seed
        self.passes = 0
        """Forward passes so far; set it to continue where an earlier training stopped."""

    @torch.compiler.disable  # it cannot trace numpy's generators
    def __call__(self) -> Sequence[int]:
        alone = not dist.is_initialized() or _is_under_zero(self.model)
        rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
        number = self.passes * ranks + rank
        self.passes += 1
        layers = len(self.model.layers)  # type: ignore[arg-type]
        plan = draw_plan(self.routing, num_layers=layers, num_micro_batches=1, seed=self.seed, step=number)
        return [int(donor) for donor in plan.donors[0]]


def _is_under_zero(model: nn.Module) -> bool:
    """Whether ZeRO shards a model's parameters (which then have a `ds_id`), their gradients or optimizer states.

    ZeRO-2 sums gradients in the order in which they arrive, and where a layer is not read its own arrive in another.
    """
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())


def enable_rcla(
    model: nn.Module, cross_layer_prob: float = 0.6, *, seed: int = 0, policy: str = "uniform"
) -> DonorDraw:
    """Let the layers of a model of one of our families read random donors whenever it trains.

    That is in training mode, where gradients are recorded; elsewhere nothing changes. Call it after
    `TrainingArguments` were made and before the model is wrapped or sharded. It works in place and keeps parameters,
    names and adapters. Each rank draws for itself, so ranks must be data parallel. `torch.compile` compiles anew for
    each draw that it has not seen, up to its limit.

    Args:
        model: of transformers, or a PEFT model around one.
        cross_layer_prob: probability that a layer reads a donor (arXiv 2604.22782, Table 1).
        seed: of the draws.
        policy: `uniform` (the paper) or `strategy` (what inference does).

    Returns:
        the draw, for those who save and restore its position.

    Raises:
        UserError: there is no such model, it was pruned, or the probability, policy or seed is impossible.
    """
    is_number = isinstance(cross_layer_prob, Real) and not isinstance(cross_layer_prob, bool)
    if policy not in _POLICIES or not is_number or not 0 <= cross_layer_prob <= 1:
        raise UserError(
            f"enable_rcla with policy {policy} and cross_layer_prob {cross_layer_prob}: the policy must be "
            f"{' or '.join(_POLICIES)}, the probability between 0 and 1"
        )
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise UserError(f"enable_rcla with seed {seed!r}: it must be a whole number from 0 to 2**63 - 1")
    require_working_transformers()
    base = route(model)
    stored = getattr(base.config, "kv_pruned_to", None)
    if stored:
        raise UserError(
            f"this checkpoint was pruned to layers {list(stored)}: its other layers have no keys and values to train; "
            f"load the whole checkpoint"
        )
    routing = RoutingConfig(policy=policy, cross_layer_prob=float(cross_layer_prob))
    base.draw_sources = DonorDraw(base, routing, int(seed))
    base.config.kv_training = routing.model_dump(exclude_defaults=True)
    for layer in base.layers:
        layer.self_attn.unread = zero_gradients
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules

        # A skipped projection is not fetched on its own, yet its gradient is reduced: whole layers are fetched.
        set_z3_leaf_modules(model, [type(base.layers[0])])
    return base.draw_sources


def disable_rcla(model: nn.Module) -> None:
    """Return to standard training: every layer reads its own keys and values."""
    base = route(model)
    base.draw_sources = None
    for layer in base.layers:
        layer.self_attn.unread = None
