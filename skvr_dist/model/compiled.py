"""Compiled layers: one graph for each way a layer can be routed, and none for each donor.

A layer sees its routing as arguments: a donor's keys and values or none, and whether its own are read. So however
donors are drawn there are three graphs (its own read by itself; its own computed and a donor's read; a donor's alone),
and one for passes in which every layer reads itself, and all layers share them. What surrounds the layers, engine,
hooks of ZeRO and recomputation, stays as it is.

Where the sequences of a micro-batch have donors each, there would be a graph for every way in which they can differ. So
attention, which calls a kernel for each of them or one that reads from an arena, is left out there, and what is before
and after it is compiled: three graphs (queries with own keys and values, or without; the rest of the layer), and one
more for queries where they are computed again in the backward pass. So it is where a flash kernel keeps to documents:
their number and the length of the longest differ from batch to batch, and a graph would hold for one alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skvr_dist.model.arena import ArenaLayer
from skvr_dist.model.attention import AttentionScope
from skvr_dist.model.decoder import KV, Decoder, DecoderLayer

Backend = Literal["inductor", "aot_eager"]
# At most three graphs of a layer for each of: with gradients and without, with documents and without; and for a
# teacher of another shape.
_MOST_GRAPHS = 32
_GPU_OPTIONS = {"realize_reads_threshold": 8, "realize_opcount_threshold": 200}
"""Of Inductor. By its own (4 and 30) the backward pass writes float32 to memory between the rotation and the norm of
heads, and reads it again."""


def resolve_compile(wanted: str, device: torch.device) -> Backend | None:
    """The backend of torch.compile that `parallel.compile` means on a device; None leaves layers as they are.

    On CPUs compiled layers are left out by themselves: a start takes a minute longer, and products of matrices, which
    nothing here speeds up, take nearly all of a step.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return None
    return "aot_eager" if wanted == "aot_eager" else "inductor"


def compile_layers(decoder: Decoder, backend: Backend, device: torch.device) -> None:
    """Compile a decoder's layers for a device, in place, and the loss; a graph is made when its routing is first met.

    Anything that a graph cannot hold, and more graphs than these layers have ways, end the run with torch's message.
    """
    # Past its limit torch would go on without the compiler, and say nothing.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    options = _GPU_OPTIONS if backend == "inductor" and device.type == "cuda" else None
    compiled = functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=False, options=options)
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        _compile_layer(layer, compiled)
    if decoder.has_head:
        decoder.head.loss_backend = backend  # type: ignore[assignment]


def _compile_layer(layer: DecoderLayer, compiled: Callable[[Any], Any]) -> None:
    plain, whole = layer.forward, compiled(layer.forward)

    def forward(
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        donors: Sequence[KV | None] | ArenaLayer,
        own_is_read: bool,
        past: KV | None,
        scopes: Sequence[AttentionScope],
        hands_out: bool = True,
    ) -> Any:
        in_parts = (
            isinstance(donors, ArenaLayer) or len(donors) > 1 or any(scope.changes_with_the_data for scope in scopes)
        )
        return (plain if in_parts else whole)(hidden, rope, donors, own_is_read, past, scopes, hands_out)

    # mypy takes an assignment to a method for a mistake.
    setattr(layer, "forward", forward)  # noqa: B010
    parts: list[tuple[nn.Module, str]] = [(layer, "before_attention"), (layer, "after_attention")]
    if layer.recompute_attention:
        parts.append((layer.self_attn, "queries"))
    for module, part in parts:
        setattr(module, part, compiled(getattr(module, part)))
