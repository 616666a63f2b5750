"""The forward pass of routed attention: every sequence of a batch reads the keys and values of a slot of its own.

One program owns a tile of queries of one head of one sequence, and walks over the keys that they see.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head size; H / K query heads share a key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots", "batch", "sequence", "heads"])
def forward_kernel(
    Q,  # [B, S, H, E]
    KV,  # [slots, 2, B, S, K, E]
    OUT,  # [B, S, H, E]
    LSE,  # float32 [B, H, S]: the logarithm of the sum of the weights, to base 2
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
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see the most keys first
    b = tl.program_id(1) // heads
    h = tl.program_id(1) % heads
    slot = tl.load(SLOT + b).to(tl.int64)
    is_slot = (slot >= 0) & (slot < slots)
    kv_heads = heads // GROUP
    # Slots are far apart: at 28 of them, a batch of 8 and 8,192 positions more than 2^31 elements.
    keys_of = KV + ((tl.where(is_slot, slot, 0) * 2 * batch + b) * sequence * kv_heads + h // GROUP).to(tl.int64) * E
    values_of = keys_of + batch.to(tl.int64) * sequence * kv_heads * E
    e = tl.arange(0, BLOCK_E)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    # Within a sequence there are fewer than 2^31 elements.
    to_sequence = (b.to(tl.int64) * sequence * heads + h) * E
    at = (rows * heads)[:, None] * E + e[None, :]
    here = (rows < sequence)[:, None] & (e < E)[None, :]
    q = tl.load(Q + to_sequence + at, mask=here, other=0.0)
    first = tl.load(FIRST + b * sequence + rows, mask=rows < sequence, other=sequence)

    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, BLOCK_E], tl.float32)
    # One loop with a mask: in two, for the tiles that need one and for those that do not, registers spill.
    low = tl.maximum(tl.min(first, 0), 0) // KEYS * KEYS
    for start in range(low, tl.minimum((tile + 1) * QUERIES, sequence), KEYS):
        columns = start + tl.arange(0, KEYS)
        there = (columns * kv_heads)[:, None] * E + e[None, :]
        inside = (columns < sequence)[:, None] & (e < E)[None, :]
        k = tl.load(keys_of + there, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = (columns[None, :] <= rows[:, None]) & (columns[None, :] >= first[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)  # rows that have seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(most - shift)
        total = total * kept + tl.sum(weights, 1)
        v = tl.load(values_of + there, mask=inside, other=0.0)
        found = found * kept[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        most = now
    # A slot that is none gives no numbers rather than those of another sequence.
    found = tl.where(is_slot, found / total[:, None], float("nan"))
    tl.store(OUT + to_sequence + at, found.to(OUT.dtype.element_ty), mask=here)
    tl.store(LSE + (b.to(tl.int64) * heads + h) * sequence + rows, most + tl.log2(total), mask=rows < sequence)
