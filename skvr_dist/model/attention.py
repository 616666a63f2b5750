"""Causal attention over grouped heads: PyTorch's SDPA, flash-attn where it is installed, and an eager reference.

Shapes: B batch, S query positions, T key positions (the last S of them are the queries' own), H query heads,
K key/value heads, E head_dim. A query at position i (of T) sees keys 0..i.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from skvr_dist.errors import UserError


@functools.cache
def flash_is_installed() -> bool:
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


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Causal attention.

    Args:
        q: [B, S, H, E].
        k, v: [B, T, K, E] with T >= S and K dividing H; head h reads key/value head h * K // H.
        backend: sdpa, flash or eager.

    Returns:
        [B, S, H, E].
    """
    if backend == "sdpa":
        return _sdpa(q, k, v)
    if backend == "flash":
        from flash_attn import flash_attn_func  # not importable without a GPU build

        return flash_attn_func(q, k, v, causal=True)
    if backend == "eager":
        return _eager(q, k, v)
    raise ValueError(f"attention backend {backend!r} is not one of sdpa, flash, eager")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    # is_causal aligns the mask to the first key, which is right only when the queries start there too.
    causal = queries == keys
    mask = None if causal or queries == 1 else _causal_mask(queries, keys, q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, in float32."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bshe,bthe->bhst", q.float(), k.float()) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~_causal_mask(q.shape[1], k.shape[1], q.device), float("-inf"))
    return torch.einsum("bhst,bthe->bshe", scores.softmax(dim=-1), v.float()).to(q.dtype)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [S, T]: which keys each query sees."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
