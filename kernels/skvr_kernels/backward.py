"""The backward pass of routed attention: gradients of queries, and of the keys and values of every slot.

A layer's keys and values may have many readers. Each adds its part to an arena of gradients in float32, at the slot
that its sequence read. A program owns its tile of keys, and readers run one after the other
(`skvr_kernels.attention`), so nothing is added atomically, and sums have the same bits every time.

Shapes: as in `skvr_kernels.forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "batch", "sequence", "heads"])
def queries_kernel(
    Q,  # [B, S, H, E]
    KV,  # [slots, 2, B, S, K, E]
    OUT,  # [B, S, H, E]
    D_OUT,  # [B, S, H, E]
    D_Q,  # [B, S, H, E]
    LSE,  # float32 [B, H, S]
    DELTA,  # float32 [B, H, S]: <output, its gradient>, made here for `keys_kernel`
    SLOT,  # int64 [B]
    FIRST,  # int32 [B, S]
    scale,
    slots,
    batch,
    sequence,
    heads,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Gradients of a tile of queries. `scale` is that of the forward pass, times log2(e) as there."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    slot = tl.load(SLOT + b).to(tl.int64)
    is_slot = (slot >= 0) & (slot < slots)
    kv_heads = heads // GROUP
    keys_of = KV + ((tl.where(is_slot, slot, 0) * 2 * batch + b) * sequence * kv_heads + h // GROUP).to(tl.int64) * E
    values_of = keys_of + batch.to(tl.int64) * sequence * kv_heads * E
    e = tl.arange(0, BLOCK_E)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    to_sequence = (b.to(tl.int64) * sequence * heads + h) * E
    at = (rows * heads)[:, None] * E + e[None, :]
    here = (rows < sequence)[:, None] & (e < E)[None, :]
    line = (b.to(tl.int64) * heads + h) * sequence + rows
    q = tl.load(Q + to_sequence + at, mask=here, other=0.0)
    d_out = tl.load(D_OUT + to_sequence + at, mask=here, other=0.0)
    out = tl.load(OUT + to_sequence + at, mask=here, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(DELTA + line, delta, mask=rows < sequence)
    lse = tl.load(LSE + line, mask=rows < sequence, other=0.0)
    first = tl.load(FIRST + b * sequence + rows, mask=rows < sequence, other=sequence)

    d_q = tl.zeros([QUERIES, BLOCK_E], tl.float32)
    low = tl.maximum(tl.min(first, 0), 0) // KEYS * KEYS
    for start in range(low, tl.minimum((tile + 1) * QUERIES, sequence), KEYS):
        columns = start + tl.arange(0, KEYS)
        there = (columns * kv_heads)[:, None] * E + e[None, :]
        inside = (columns < sequence)[:, None] & (e < E)[None, :]
        k = tl.load(keys_of + there, mask=inside, other=0.0)
        v = tl.load(values_of + there, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= first[:, None])
        weights = tl.where(is_seen, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - delta[:, None])
        d_q += tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)
    d_q = tl.where(is_slot, d_q * (scale * 0.6931471805599453), float("nan"))  # ln(2): `scale` has a log2(e) in it
    tl.store(D_Q + to_sequence + at, d_q.to(D_Q.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["slots", "batch", "sequence", "heads"])
def keys_kernel(
    Q,  # [B, S, H, E]
    KV,  # [slots, 2, B, S, K, E]
    D_OUT,  # [B, S, H, E]
    D_KV,  # float32 [slots, 2, B, S, K, E]: added to
    LSE,  # float32 [B, H, S]
    DELTA,  # float32 [B, H, S]
    SLOT,  # int64 [B]
    END,  # int32 [B, S]
    scale,
    slots,
    batch,
    sequence,
    heads,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Adds the gradients of a tile of keys and values, from all query heads that share them."""
    kv_heads = heads // GROUP
    b = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    slot = tl.load(SLOT + b).to(tl.int64)
    if (slot >= 0) & (slot < slots):
        offset = ((slot * 2 * batch + b) * sequence * kv_heads + kv_head).to(tl.int64) * E
        to_values = batch.to(tl.int64) * sequence * kv_heads * E
        e = tl.arange(0, BLOCK_E)
        columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
        at = (columns * kv_heads)[:, None] * E + e[None, :]
        here = (columns < sequence)[:, None] & (e < E)[None, :]
        k = tl.load(KV + offset + at, mask=here, other=0.0)
        v = tl.load(KV + offset + to_values + at, mask=here, other=0.0)
        end = tl.load(END + b * sequence + columns, mask=columns < sequence, other=0)

        d_k = tl.zeros([KEYS, BLOCK_E], tl.float32)
        d_v = tl.zeros([KEYS, BLOCK_E], tl.float32)
        low = tl.program_id(0) * KEYS // QUERIES * QUERIES
        tiles = tl.cdiv(tl.minimum(tl.max(end, 0), sequence) - low, QUERIES)
        to_lines = b.to(tl.int64) * heads * sequence
        to_sequence = to_lines * E
        # One loop over heads and tiles, which the compiler can pipeline.
        for number in range(GROUP * tiles):
            h = kv_head * GROUP + number // tiles
            rows = low + number % tiles * QUERIES + tl.arange(0, QUERIES)
            there = (rows * heads + h)[:, None] * E + e[None, :]
            inside = (rows < sequence)[:, None] & (e < E)[None, :]
            line = h * sequence + rows
            q = tl.load(Q + to_sequence + there, mask=inside, other=0.0)
            lse = tl.load(LSE + to_lines + line, mask=rows < sequence, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            is_seen = (rows[None, :] >= columns[:, None]) & (rows[None, :] < end[:, None])
            weights = tl.where(is_seen, tl.exp2(scores - lse[None, :]), 0.0)
            d_out = tl.load(D_OUT + to_sequence + there, mask=inside, other=0.0)
            d_v += tl.dot(weights.to(d_out.dtype), d_out, input_precision=PRECISION)
            delta = tl.load(DELTA + to_lines + line, mask=rows < sequence, other=0.0)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_scores = weights * (d_weights - delta[None, :])
            d_k += tl.dot(d_scores.to(q.dtype), q, input_precision=PRECISION)
        d_k *= scale * 0.6931471805599453
        d_k += tl.load(D_KV + offset + at, mask=here, other=0.0)
        tl.store(D_KV + offset + at, d_k, mask=here)
        d_v += tl.load(D_KV + offset + to_values + at, mask=here, other=0.0)
        tl.store(D_KV + offset + to_values + at, d_v, mask=here)
