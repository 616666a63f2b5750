"""Putting a layer's keys and values into its slot, with the norm and the rotation of keys on the way, and back.

Forwards, what the projections made is normed, rotated and stored in one pass. Backwards, the sums that the readers left
in the arena of gradients become gradients of what was written; what was read is set to zero again for the next
micro-batch.

Shapes: B batch, S sequence, K key/value heads, E head size. A head is rotated by halves: (a, b) becomes
(a cos - b sin, b cos + a sin), each half with its own part of the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "batch", "sequence", "kv_heads", "table_stride"])
def write_kernel(
    K,  # [B, S, K, E]
    V,  # [B, S, K, E]
    KV,  # [slots, 2, B, S, K, E]
    WEIGHT,  # [E], of the norm
    COS,  # float32 [S, E] or [B, S, E]
    SIN,
    SLOT,  # int64 [B]
    eps,
    slots,
    batch,
    sequence,
    kv_heads,
    table_stride,  # S x E if every sequence has tables of its own, 0 if they share them
    E: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
) -> None:
    b = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    slot = tl.load(SLOT + b).to(tl.int64)
    if (slot >= 0) & (slot < slots):
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        e = tl.arange(0, BLOCK_HALF)
        here = (rows < sequence)[:, None] & (e < E // 2)[None, :]
        at = ((b.to(tl.int64) * sequence + rows) * kv_heads + head)[:, None] * E + e[None, :]
        offset = ((slot * 2 * batch + b) * sequence * kv_heads + head).to(tl.int64) * E
        to = offset + (rows.to(tl.int64) * kv_heads)[:, None] * E + e[None, :]
        to_values = batch.to(tl.int64) * sequence * kv_heads * E
        tl.store(KV + to_values + to, tl.load(V + at, mask=here, other=0.0), mask=here)
        tl.store(KV + to_values + to + E // 2, tl.load(V + at + E // 2, mask=here, other=0.0), mask=here)
        a = tl.load(K + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(K + at + E // 2, mask=here, other=0.0).to(tl.float32)
        if NORM:
            inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(z * z, 1)) / E + eps)
            a *= inverse[:, None] * tl.load(WEIGHT + e, mask=e < E // 2, other=0.0).to(tl.float32)[None, :]
            z *= inverse[:, None] * tl.load(WEIGHT + e + E // 2, mask=e < E // 2, other=0.0).to(tl.float32)[None, :]
        if ROTATE:
            angle = b * table_stride + rows[:, None] * E + e[None, :]
            cos_a, sin_a = tl.load(COS + angle, mask=here, other=0.0), tl.load(SIN + angle, mask=here, other=0.0)
            cos_z = tl.load(COS + angle + E // 2, mask=here, other=0.0)
            sin_z = tl.load(SIN + angle + E // 2, mask=here, other=0.0)
            a, z = a * cos_a - z * sin_a, z * cos_z + a * sin_z
        tl.store(KV + to, a.to(KV.dtype.element_ty), mask=here)
        tl.store(KV + to + E // 2, z.to(KV.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["slots", "batch", "sequence", "kv_heads", "table_stride"])
def unwrite_kernel(
    D_KV,  # float32 [slots, 2, B, S, K, E]: read, and set to zero
    K,  # [B, S, K, E], as they were before norm and rotation
    D_K,  # [B, S, K, E]
    D_V,  # [B, S, K, E]
    D_WEIGHT,  # float32 [programs, E], a part of each program
    WEIGHT,
    COS,
    SIN,
    SLOT,
    eps,
    slots,
    batch,
    sequence,
    kv_heads,
    table_stride,
    E: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
) -> None:
    b = tl.program_id(1) // kv_heads
    head = tl.program_id(1) % kv_heads
    slot = tl.load(SLOT + b).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_HALF)
    here = (rows < sequence)[:, None] & (e < E // 2)[None, :]
    at = ((b.to(tl.int64) * sequence + rows) * kv_heads + head)[:, None] * E + e[None, :]
    # Of a slot that is none nothing is read or set to zero, and gradients are no numbers.
    is_slot = (slot >= 0) & (slot < slots)
    there = tl.where(is_slot, here, False)
    offset = ((tl.where(is_slot, slot, 0) * 2 * batch + b) * sequence * kv_heads + head).to(tl.int64) * E
    of = offset + (rows.to(tl.int64) * kv_heads)[:, None] * E + e[None, :]
    of_values = batch.to(tl.int64) * sequence * kv_heads * E + of
    for half in tl.static_range(2):
        gradient = tl.load(D_KV + of_values + half * (E // 2), mask=there, other=float("nan"))
        tl.store(D_V + at + half * (E // 2), gradient.to(D_V.dtype.element_ty), mask=here)
    nowhere = tl.where(is_slot, 0.0, float("nan"))  # rows past the end must not reach sums over rows
    d_a = tl.load(D_KV + of, mask=there, other=nowhere)
    d_z = tl.load(D_KV + of + E // 2, mask=there, other=nowhere)
    # Zeros need not come from the thread that has read the element: all threads must have read before any writes.
    tl.debug_barrier()
    nothing = tl.zeros([ROWS, BLOCK_HALF], tl.float32)
    for half in tl.static_range(2):
        tl.store(D_KV + of + half * (E // 2), nothing, mask=there)
        tl.store(D_KV + of_values + half * (E // 2), nothing, mask=there)
    if ROTATE:
        angle = b * table_stride + rows[:, None] * E + e[None, :]
        cos_a, sin_a = tl.load(COS + angle, mask=here, other=0.0), tl.load(SIN + angle, mask=here, other=0.0)
        cos_z = tl.load(COS + angle + E // 2, mask=here, other=0.0)
        sin_z = tl.load(SIN + angle + E // 2, mask=here, other=0.0)
        d_a, d_z = d_a * cos_a + d_z * sin_z, d_z * cos_z - d_a * sin_a
    if NORM:
        a = tl.load(K + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(K + at + E // 2, mask=here, other=0.0).to(tl.float32)
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(z * z, 1)) / E + eps)[:, None]
        part = D_WEIGHT + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * E + e
        tl.store(part, tl.sum(d_a * a * inverse, 0), mask=e < E // 2)
        tl.store(part + E // 2, tl.sum(d_z * z * inverse, 0), mask=e < E // 2)
        d_a *= tl.load(WEIGHT + e, mask=e < E // 2, other=0.0).to(tl.float32)[None, :]
        d_z *= tl.load(WEIGHT + e + E // 2, mask=e < E // 2, other=0.0).to(tl.float32)[None, :]
        along = (tl.sum(d_a * a, 1) + tl.sum(d_z * z, 1))[:, None] * inverse * inverse / E
        d_a, d_z = inverse * (d_a - a * along), inverse * (d_z - z * along)
    tl.store(D_K + at, d_a.to(D_K.dtype.element_ty), mask=here)
    tl.store(D_K + at + E // 2, d_z.to(D_K.dtype.element_ty), mask=here)
