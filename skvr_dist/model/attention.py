"""Causal attention over grouped heads: flash kernels by way of PyTorch, PyTorch's SDPA, and an eager reference.

PyTorch has one operation for all flash kernels, `aten::_flash_attention_forward`: its own FlashAttention 2, or FA3 or
FA4 where `torch.nn.attention.activate_flash_attention_impl` has put them in its place. It takes heads as they lie here,
with documents and without, so nothing is transposed, and graphs of torch.compile hold it as they hold any other. It is
called as such, since what is built on it falls short: `varlen_attn` of PyTorch 2.11 states the causal mask as a window
too, which FA4's backward refuses, and adds a launch and an operation in Python; SDPA takes no bounds of documents.

Shapes: B batch, S query positions, T key positions (the last S of them are the queries' own), H query heads,
K key/value heads, E head_dim. A query at position i (of T) sees keys 0..i.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from skvr_dist.config.model import FLASH_KERNELS
from skvr_dist.model.attention_choice import LARGEST_HEAD, LARGEST_HEAD_OF_FA4
from skvr_dist.model.documents import Documents


@dataclass(frozen=True, eq=False)
class AttentionScope:
    """What the queries of some sequences see, beside what is later than they are, and what computes it.

    All of it is there when the first layer runs, so that layers that are compiled only read it.
    """

    backend: str
    """One of `BACKENDS`."""
    mask: Tensor | None = None
    """bool [B, 1, S, S]: which keys each query sees, if it is confined to its document; for SDPA and eager."""
    bounds: Tensor | None = None
    """int32 [documents + 1]: where each document begins among all B x S positions, and the end; for flash kernels."""
    longest: int = 0
    """Tokens of the longest of those documents."""

    @property
    def changes_with_the_data(self) -> bool:
        """Whether shapes or numbers in it do, from batch to batch, so that a graph would hold for that batch alone."""
        return self.bounds is not None


def scopes_of(backend: str, documents: Documents | None, rows: int) -> list[AttentionScope]:
    """The scope of each row of donors.

    Args:
        documents: what queries are confined to, made for that many rows, on the device of the queries; None: nothing.
        rows: R.
    """
    if documents is None:
        return [AttentionScope(backend)] * rows
    assert len(documents.bounds) == rows, f"documents of {len(documents.bounds)} rows, but {rows} rows of donors"
    if backend in FLASH_KERNELS:
        return [
            AttentionScope(backend, bounds=bounds, longest=longest)
            for bounds, longest in zip(documents.bounds, documents.longest, strict=True)
        ]
    return [AttentionScope(backend, mask=_mask_within(part)) for part in documents.positions.chunk(rows)]


def attend(q: Tensor, k: Tensor, v: Tensor, scope: AttentionScope) -> Tensor:
    """Causal attention.

    Args:
        q: [B, S, H, E].
        k, v: [B, T, K, E] with T >= S and K dividing H; head h reads key/value head h * K // H.
        scope: what computes it, and what each query is confined to; if that is anything, T = S.

    Returns:
        [B, S, H, E].
    """
    if scope.backend not in BACKENDS:
        raise ValueError(f"attention backend {scope.backend!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[scope.backend](q, k, v, scope)


def _flash(q: Tensor, k: Tensor, v: Tensor, scope: AttentionScope) -> Tensor:
    kernel = torch.ops.aten._flash_attention_forward
    if scope.bounds is None:
        out, *_ = kernel(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False)
        return out
    flat = (x.flatten(0, 1) for x in (q, k, v))
    out, *_ = kernel(*flat, scope.bounds, scope.bounds, scope.longest, scope.longest, 0.0, True, False)
    return out.view_as(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scope: AttentionScope) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    # is_causal aligns the mask to the first key, which is right only when the queries start there too.
    causal = queries == keys and scope.mask is None
    mask = scope.mask
    if mask is None and not causal and queries > 1:
        mask = _causal_mask(queries, keys, q.device)
    if not q.is_cuda or _sdpa_has_flash(q, mask):
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    else:
        # Of grouped heads SDPA would compute the formula and keep all scores several times over: its flash kernel alone
        # has them. Copies of keys and values let it take its memory-efficient kernel.
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        with sdpa_kernel(_WITHOUT_FLASH):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


_WITHOUT_FLASH = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
"""For what SDPA's flash kernel cannot do; FA4 in its place is chosen by SDPA without a look at the head size."""


def _sdpa_has_flash(q: Tensor, mask: Tensor | None) -> bool:
    """Whether the flash kernel that SDPA has on a GPU can do heads [B, H, S, E]: PyTorch's own, or what is in force."""
    largest = LARGEST_HEAD_OF_FA4 if current_flash_attention_impl() == "FA4" else LARGEST_HEAD
    return mask is None and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= largest


def _eager(q: Tensor, k: Tensor, v: Tensor, scope: AttentionScope) -> Tensor:
    """The formula, in float32."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    mask = _causal_mask(q.shape[1], k.shape[1], q.device) if scope.mask is None else scope.mask
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhst,bthe->bshe", scores.softmax(dim=-1), v.float()).to(q.dtype)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [S, T]: which keys each query sees."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _mask_within(positions: Tensor) -> Tensor:
    """bool [B, 1, S, S]: which keys each query sees within its document, of places in documents, int [B, S]."""
    place = torch.arange(positions.shape[1], device=positions.device)
    first = place - positions
    return ((place >= first[..., None]) & (place <= place[:, None]))[:, None]


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionScope], Tensor]] = {
    **dict.fromkeys(map(str, FLASH_KERNELS), _flash),
    "sdpa": _sdpa,
    "eager": _eager,
}
"""What `attend` may be computed with, by the name of `skvr_dist.config.model.AttentionName`."""
