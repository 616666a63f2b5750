"""The reference's own draws, made from the text of docs/draws.md alone.

It shares no code with what draws them in training (`skvr_dist.model.decoder`, `skvr_dist.routing`): even the
counter-based generator is written out. So a wrong draw there shows here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

_WORD = 2**64
# The constants of Philox4x64 (Salmon et al., SC 2011, section 4.3 and the published Random123).
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def weight_shapes(shape: dict) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name; `shape` is the model section of a configuration."""
    hidden, head = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        name = f"layers.{layer}"
        sides = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        for letter, matrix in sides.items():
            shapes[f"{name}.self_attn.{letter}_proj.weight"] = matrix
            if shape.get("attention_bias") and not (shape["architecture"] == "qwen2" and letter == "o"):
                shapes[f"{name}.self_attn.{letter}_proj.bias"] = matrix[:1]
        if shape["qk_norm"]:
            shapes[f"{name}.self_attn.q_norm.weight"] = shapes[f"{name}.self_attn.k_norm.weight"] = (head,)
        for side in ("gate", "up"):
            shapes[f"{name}.mlp.{side}_proj.weight"] = (shape["intermediate_size"], hidden)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, shape["intermediate_size"])
        shapes[f"{name}.input_layernorm.weight"] = shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    shapes["norm.weight"] = (hidden,)
    if not shape["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (shape["vocab_size"], hidden)
    return shapes


def initial_weights(shape: dict, seed: int) -> dict[str, Tensor]:
    """Initial weights, float32, by name."""
    return {name: _drawn(name, size, shape["initializer_range"], seed) for name, size in weight_shapes(shape).items()}


def _drawn(name: str, size: tuple[int, ...], deviation: float, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(size)
    if "norm" in name:
        return torch.ones(size)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
    first_eight = bytes.fromhex(digest[:16])
    generator = torch.Generator("cpu")
    generator.manual_seed(sum(byte << (8 * place) for place, byte in enumerate(first_eight)))
    return deviation * torch.randn(size, generator=generator)


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x64-10: four 64-bit words of a counter (lowest word first) and a key of 128 bits."""
    a, b, c, d = counter
    low, high = key % _WORD, key // _WORD
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b, c, d = second // _WORD ^ b ^ low, second % _WORD, first // _WORD ^ d ^ high, first % _WORD
        low, high = (low + _KEY_STEPS[0]) % _WORD, (high + _KEY_STEPS[1]) % _WORD
    return a, b, c, d


def _numbers(seed: int, step: int, row: int) -> Iterator[float]:
    """Numbers in [0, 1), without end."""
    block = 1
    while True:
        for word in philox((block, 0, row, step), seed):
            yield (word >> 11) / 2**53
        block += 1


def rate(value: float | dict, step: int, steps: int) -> float:
    """What a number or a schedule of a configuration is at step `step` (the first is 0) of `steps`."""
    if not isinstance(value, dict):
        return value
    place = step if value.get("unit", "share") == "steps" else step / steps
    before = [point for point in value["points"] if point[0] <= place]
    after = [point for point in value["points"] if point[0] > place]
    if not before or not after:
        return before[-1][1] if before else after[0][1]
    (left, start), (right, end) = before[-1], after[0]
    return start + (end - start) * ((place - left) / (right - left))


def donors(routing: dict, layers: int, *, seed: int, step: int, row: int, steps: int = 1) -> list[int]:
    """The layer that each layer reads; `routing` is the section of a configuration, `steps` those of its schedules."""
    numbers = _numbers(seed, step, row)
    coins = [next(numbers) for _ in range(layers)]
    picks = [next(numbers) for _ in range(layers)]
    policy, prob = routing["policy"], rate(routing.get("cross_layer_prob") or 0.0, step, steps)
    if next(numbers) < rate(routing.get("full_retention_share", 0.0), step, steps):
        prob = 0.0
    reads: list[int] = []
    for layer in range(layers):
        elsewhere = policy == "cla" or (policy != "none" and coins[layer] < prob)
        reads.append(_donor(routing, layer, picks[layer], reads) if layer and elsewhere else layer)
    return reads


def _donor(routing: dict, layer: int, pick: float, reads: list[int]) -> int:
    """What a layer above 0 reads once its coin sends it elsewhere; `reads` are the donors of the layers below it."""

    def below(count: int) -> int:
        return min(math.floor(pick * count), count - 1)

    policy = routing["policy"]
    if policy == "uniform":
        return below(layer)
    if policy == "window":
        return layer - 1 - below(min(layer, routing["window"]))
    if policy == "strategy":
        return reads[layer - 1]
    if policy in ("cla", "rd_cla"):
        return layer - layer % routing["group_size"]
    raise ValueError(f"policy {policy!r} has no draw of the reference's own; write it here, from docs/draws.md")


def plan(routing: dict, layers: int, rows: int, *, seed: int, step: int, steps: int = 1) -> list[list[int]]:
    """The donors of all rows of a step (micro-batches, or sequences where each has its own), [rows][L]."""
    return [donors(routing, layers, seed=seed, step=step, row=row, steps=steps) for row in range(rows)]
