"""Writing into an arena and attending to it, with gradients.

Autograd does not see the arena: saved for the backward pass, it would be refused as soon as another layer has written
to it. What autograd must know is the order, and a token of one element carries that. Every operation takes the token
of the one before it and gives one of its own, so backwards they run in exactly the opposite order: all readers of a
slot before its writer, one at a time.

    token = arena_token(device)
    token = write(arena, slot, k, v, token, norm=(weight, eps), rope=(cos, sin))
    out, token = attend(arena, slot_of_each_sequence, q, documents, token)

Shapes: B batch, S sequence, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from skvr_kernels.arena import Arena, Documents, is_debugging, is_interpreted
from skvr_kernels.backward import keys_kernel, queries_kernel
from skvr_kernels.forward import forward_kernel
from skvr_kernels.tiles import SMALLEST, Kernel, Tiles, tiles_for
from skvr_kernels.writing import unwrite_kernel, write_kernel

_MOST_HEADS = 65_535
"""Of all sequences: the second dimension of a CUDA grid (CUDA C++ Programming Guide)."""
Rope = tuple[Tensor, Tensor]
"""cos and sin, float32 [S, E], [1, S, E] or [B, S, E]."""


def arena_token(device: torch.device | str) -> Tensor:
    """The token that the first operation of a micro-batch takes."""
    return torch.zeros(1, device=device, requires_grad=True)


def write(
    arena: Arena,
    slot: Tensor,
    k: Tensor,
    v: Tensor,
    token: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    rope: Rope | None = None,
) -> Tensor:
    """Store a layer's keys and values, the keys normed and rotated; returns the next token.

    Args:
        slot: int64 [B], the slot of each sequence.
        k, v: [B, S, K, E], of the arena's dtype.
        norm: weight [E] and eps of an RMS norm over each head's keys.
        rope: the tables of the rotation.

    Raises:
        ValueError: shapes or dtypes that differ from the arena's; when debugging, a slot that is none.
    """
    for name, each in (("keys", k), ("values", v)):
        _require_like(arena, name, each, arena.kv.shape[4])
    _require_slots(arena, slot)
    weight, eps = norm or (None, 0.0)
    _require_norm_and_rope(arena, weight, rope)
    return _Write.apply(k, v, weight, token, arena, slot, eps, rope)


def attend(arena: Arena, slot: Tensor, q: Tensor, documents: Documents, token: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of queries to the slot that each sequence reads; returns [B, S, H, E] and the next token.

    Args:
        slot: int64 [B]; a sequence whose slot is none gets NaN.
        q: [B, S, H, E], of the arena's dtype; K divides H.

    Raises:
        ValueError: shapes or dtypes that differ from the arena's; when debugging, a wrong slot or bound.
    """
    kv_heads = arena.kv.shape[4]
    if q.dim() != 4 or q.shape[2] % kv_heads:
        raise ValueError(
            f"queries {tuple(q.shape)} are not [B, S, H, E] with H a multiple of the {kv_heads} heads of keys"
        )
    _require_like(arena, "queries", q, q.shape[2])
    _require_slots(arena, slot)
    for each in (documents.first, documents.end):
        if each.shape != q.shape[:2] or each.dtype != torch.int32 or not each.is_contiguous():
            raise ValueError(
                f"bounds of documents are {each.dtype} {tuple(each.shape)}, for these queries they must be contiguous "
                f"torch.int32 {tuple(q.shape[:2])}; make them with Documents.of"
            )
    if is_debugging():
        documents.require_consistent()
    return _Attend.apply(q, token, arena, slot, documents)


def _require_like(arena: Arena, name: str, given: Tensor, heads: int) -> None:
    _, _, batch, sequence, _, head_size = arena.kv.shape
    wanted = (batch, sequence, heads, head_size)
    if tuple(given.shape) != wanted or given.dtype != arena.kv.dtype or given.device != arena.kv.device:
        raise ValueError(
            f"{name} are {given.dtype} {tuple(given.shape)} on {given.device}, for the arena they must be "
            f"{arena.kv.dtype} {wanted} on {arena.kv.device}"
        )
    if batch * heads > _MOST_HEADS:
        raise ValueError(f"{name} have {batch} x {heads} heads, more than the {_MOST_HEADS} of one launch")


def _require_norm_and_rope(arena: Arena, weight: Tensor | None, rope: Rope | None) -> None:
    _, _, batch, sequence, _, head_size = arena.kv.shape
    if weight is not None and weight.shape != (head_size,):
        raise ValueError(f"the weight of the norm is {tuple(weight.shape)}, for the arena it must be {(head_size,)}")
    if rope is None:
        return
    cos, sin = rope
    possible = [(sequence, head_size), (1, sequence, head_size), (batch, sequence, head_size)]
    if cos.shape != sin.shape or tuple(cos.shape) not in possible or {cos.dtype, sin.dtype} != {torch.float32}:
        raise ValueError(
            f"the tables of the rotation are {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}, for "
            f"the arena both must be torch.float32 {possible[0]} or {possible[-1]}"
        )


def _require_slots(arena: Arena, slot: Tensor) -> None:
    batch = arena.kv.shape[2]
    if slot.shape != (batch,) or slot.dtype != torch.int64 or not slot.is_contiguous():
        raise ValueError(
            f"slots are {slot.dtype} {tuple(slot.shape)}, they must be contiguous torch.int64 {(batch,)}: one for each "
            f"sequence"
        )
    if is_debugging():
        arena.require_slots(slot)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        k: Tensor,
        v: Tensor,
        weight: Tensor | None,
        token: Tensor,
        arena: Arena,
        slot: Tensor,
        eps: float,
        rope: Rope | None,
    ) -> Tensor:
        k, v = k.contiguous(), v.contiguous()
        ctx.arena, ctx.slot, ctx.eps, ctx.rope = arena, slot, eps, rope
        ctx.save_for_backward(k if weight is not None else None, weight)
        grid, options = _writing("write", k, weight, rope)
        write_kernel[grid](k, v, arena.kv, *_tables(k, weight, rope), slot, eps, *_sizes(arena, rope), **options)
        return torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Any, ...]:
        arena: Arena = ctx.arena
        k, weight = ctx.saved_tensors
        d_k = torch.empty(arena.kv.shape[2:], dtype=arena.kv.dtype, device=arena.kv.device)
        d_v = torch.empty_like(d_k)
        grid, options = _writing("unwrite", d_k, weight, ctx.rope)
        parts = torch.zeros(grid[0] * grid[1], d_k.shape[-1], device=d_k.device) if weight is not None else d_k
        tables = _tables(d_k, weight, ctx.rope)
        unwrite_kernel[grid](
            arena.gradients, d_k if k is None else k, d_k, d_v, parts, *tables, ctx.slot, ctx.eps,
            *_sizes(arena, ctx.rope), **options
        )  # fmt: skip
        d_weight = None if weight is None else parts.sum(0).to(weight.dtype)
        return d_k, d_v, d_weight, d_token, None, None, None, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, token: Tensor, arena: Arena, slot: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        q = q.contiguous()
        batch, sequence, heads, _ = q.shape
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, sequence, dtype=torch.float32, device=q.device)
        tiles, options = _attending("forward", arena, q)
        grid = (triton.cdiv(sequence, tiles.queries), batch * heads)
        forward_kernel[grid](q, arena.kv, out, lse, slot, documents.first, *_numbers(arena, q), **options)
        ctx.arena, ctx.slot, ctx.documents = arena, slot, documents
        ctx.save_for_backward(q, out, lse)
        return out, torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_token: Tensor) -> tuple[Any, ...]:
        arena: Arena = ctx.arena
        q, out, lse = ctx.saved_tensors
        batch, sequence, heads, _ = q.shape
        d_out, d_q, delta = d_out.contiguous(), torch.empty_like(q), torch.empty_like(lse)
        numbers = _numbers(arena, q)
        tiles, options = _attending("queries", arena, q)
        grid = (triton.cdiv(sequence, tiles.queries), batch * heads)
        first, end = ctx.documents.first, ctx.documents.end
        queries_kernel[grid](q, arena.kv, out, d_out, d_q, lse, delta, ctx.slot, first, *numbers, **options)
        tiles, options = _attending("keys", arena, q)
        grid = (triton.cdiv(sequence, tiles.keys), batch * arena.kv.shape[4])
        keys_kernel[grid](q, arena.kv, d_out, arena.gradients, lse, delta, ctx.slot, end, *numbers, **options)
        return d_q, d_token, None, None, None


def _attending(kernel: Kernel, arena: Arena, q: Tensor) -> tuple[Tiles, dict[str, Any]]:
    """The tiles of a kernel that attends, and what its compilation depends on."""
    head_size = q.shape[-1]
    tiles = SMALLEST if is_interpreted() else tiles_for(kernel, _capability(q.device), head_size, q.dtype)
    return tiles, {
        "E": head_size,
        "BLOCK_E": max(16, triton.next_power_of_2(head_size)),
        "GROUP": q.shape[2] // arena.kv.shape[4],
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "PRECISION": precision_of(q.dtype),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def precision_of(dtype: torch.dtype) -> str:
    """How products are made: in float32 from three products of TF32, whose error is that of float32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _numbers(arena: Arena, q: Tensor) -> tuple[float, int, int, int, int]:
    """Scale, slots, batch, sequence and heads, as the kernels that attend take them; weights are powers of two."""
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    return scale, arena.slots, q.shape[0], q.shape[1], q.shape[2]


def _writing(
    kernel: Kernel, k: Tensor, weight: Tensor | None, rope: Rope | None
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of a kernel that writes, and what its compilation depends on."""
    batch, sequence, kv_heads, head_size = k.shape
    tiles = SMALLEST if is_interpreted() else tiles_for(kernel, _capability(k.device), head_size, k.dtype)
    return (triton.cdiv(sequence, tiles.queries), batch * kv_heads), {
        "E": head_size,
        "BLOCK_HALF": triton.next_power_of_2(head_size // 2),
        "ROWS": tiles.queries,
        "NORM": weight is not None,
        "ROTATE": rope is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _tables(k: Tensor, weight: Tensor | None, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weight of the norm, cos and sin; any tensor stands for what a kernel is compiled without."""
    cos, sin = (k, k) if rope is None else (each.contiguous() for each in rope)
    return k if weight is None else weight.contiguous(), cos, sin


def _sizes(arena: Arena, rope: Rope | None) -> tuple[int, int, int, int, int]:
    """Slots, batch, sequence, heads of keys and the stride between tables, as the kernels that write take them."""
    _, _, batch, sequence, kv_heads, head_size = arena.kv.shape
    is_own = rope is not None and rope[0].dim() == 3 and rope[0].shape[0] > 1
    return arena.slots, batch, sequence, kv_heads, sequence * head_size if is_own else 0


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
