"""Causal attention over grouped heads: PyTorch's SDPA, flash-attn where it is installed, and an eager reference.

Shapes: B batch, S query positions, T key positions (the last S of them are the queries' own), H query heads,
K key/value heads, E head_dim. A query at position i (of T) sees keys 0..i.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skvr_dist.errors import UserError


@functools.cache
def flash_is_installed() -> bool:
    """Whether the package flash-attn is there."""
    return importlib.util.find_spec("flash_attn") is not None


def require_backend(name: str) -> None:
    """Raises `UserError` if that backend is not available here."""
    if name == "flash" and not flash_is_installed():
        raise UserError("model.attention is flash, but the package flash-attn is not installed; use sdpa or auto")


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` is flash-attn where it is installed and takes the dtype, else SDPA; other names are taken as they are."""
    if name != "auto":
        return name
    suits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "flash" if suits and flash_is_installed() else "sdpa"


class DocumentMask:
    """Attention that stays within documents: what a backend needs, computed once for all layers.

    All of it is there when the first layer runs, so that layers that are compiled only read it.

    Args:
        numbers: int [B, S], the document of each position, never falling within a sequence.
        backend: one of `BACKENDS`.
    """

    mask: Tensor | None = None
    """bool [B, 1, S, S]: which keys each query sees; for backends that take a mask."""
    flash_bounds: tuple[Tensor, int] | None = None
    """int32 [documents + 1], where each begins among all B x S positions; and the longest's length."""

    def __init__(self, numbers: Tensor, backend: str) -> None:
        starts = torch.ones_like(numbers, dtype=torch.bool)
        starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        place = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        self.positions = place - torch.where(starts, place, 0).cummax(dim=1).values
        """int64 [B, S]: the place of each token within its document."""
        if backend == "flash":
            flat = starts.flatten()
            bounds = F.pad(flat.nonzero().flatten(), (0, 1), value=len(flat)).int()
            self.flash_bounds = bounds, int(bounds.diff().max())
        else:
            same = numbers[:, :, None] == numbers[:, None, :]
            self.mask = (same & _causal_mask(same.shape[1], same.shape[2], same.device))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str, document_mask: DocumentMask | None = None) -> Tensor:
    """Causal attention.

    Args:
        q: [B, S, H, E].
        k, v: [B, T, K, E] with T >= S and K dividing H; head h reads key/value head h * K // H.
        backend: one of `BACKENDS`.
        document_mask: what each query is confined to, with T = S; None lets it see all earlier keys.

    Returns:
        [B, S, H, E].
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, document_mask)


def _flash(q: Tensor, k: Tensor, v: Tensor, document_mask: DocumentMask | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # not importable without a GPU build

    if document_mask is None:
        return flash_attn_func(q, k, v, causal=True)
    assert document_mask.flash_bounds is not None
    bounds, longest = document_mask.flash_bounds
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, causal=True)
    return out.view_as(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, document_mask: DocumentMask | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    # is_causal aligns the mask to the first key, which is right only when the queries start there too.
    causal = queries == keys and document_mask is None
    mask: Tensor | None = None
    if document_mask is not None:
        mask = document_mask.mask
    elif not causal and queries > 1:
        mask = _causal_mask(queries, keys, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor, document_mask: DocumentMask | None) -> Tensor:
    """The formula, in float32."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    mask = _causal_mask(q.shape[1], k.shape[1], q.device) if document_mask is None else document_mask.mask
    assert mask is not None
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhst,bthe->bshe", scores.softmax(dim=-1), v.float()).to(q.dtype)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [S, T]: which keys each query sees."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, DocumentMask | None], Tensor]] = {
    "sdpa": _sdpa,
    "flash": _flash,
    "eager": _eager,
}
"""What `attend` may be computed with, by the name of `skvr_dist.config.model.AttentionName`."""
