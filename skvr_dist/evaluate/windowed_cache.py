"""Caches of transformers that hold the last tokens only, in full precision or quantized.

Shapes: B batch, K key/value heads, T positions that are held, E head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer

from skvr_dist.errors import UserError

_GROUP = 64
"""Elements that share a scale and a zero point, as transformers' caches have it; fewer where a head is smaller."""
_BYTES_OF_FLOATS = 2
"""Elements in full precision, scales and zero points are counted in bf16, as they are served."""


class WindowedLayer(DynamicLayer):
    """Keys and values in full precision.

    Args:
        window: positions that are kept; None keeps all.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self._window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new positions [B, K, S, E]; returns all that a query of any of them may read, [B, K, T + S, E] each."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = _last(keys, self._window), _last(values, self._window)
        return keys, values


class WindowedQuantizedLayer(HQQQuantizedLayer):
    """Keys and values of HQQ's `bits`, but for those that came since the last full stretch of `recent` positions.

    Each group of at most 64 elements of a head at one position has its own scale and zero point, so that what is
    stored of a text does not depend on what else is in the batch.
    """

    def __init__(self, bits: int, head_dim: int, recent: int, window: int | None) -> None:
        group = math.gcd(head_dim, _GROUP)
        super().__init__(nbits=bits, axis_key=1, axis_value=1, q_group_size=group, residual_length=recent)
        self._window = window

    def _quantize(self, tensor: Tensor, axis: int) -> Any:
        return super()._quantize(_last(tensor, self._window).contiguous(), axis)


def new_cache(layers: int, head_dim: int, *, bits: int, recent: int, window: int | None) -> Cache:
    """An empty cache for a model of so many layers.

    Args:
        bits: of an element; 16 stands for full precision, whatever the model computes in.
        recent: positions that come before they are quantized, all at once.
        window: positions that are kept; None keeps all.

    Raises:
        UserError: HQQ is not installed.
    """
    if bits == 16:
        return Cache(layers=[WindowedLayer(window) for _ in range(layers)])
    try:
        return Cache(layers=[WindowedQuantizedLayer(bits, head_dim, recent, window) for _ in range(layers)])
    except ImportError:
        raise UserError(
            f"a cache of {bits} bits needs the package hqq, which is not installed; pip install hqq"
        ) from None


def held_bytes(cache: Cache) -> int:
    """Bytes of all that a cache holds, measured; floating point numbers count as bf16."""
    return sum(_bytes(tensor) for layer in cache.layers if layer.is_initialized for tensor in _tensors(layer))


def _tensors(layer: Any) -> list[Tensor]:
    """Everything that is kept between two calls."""
    held = [layer.keys, layer.values]
    for packed, meta in filter(None, (getattr(layer, f"_quantized_{part}", None) for part in ("keys", "values"))):
        held += [packed, meta["scale"], meta["zero"]]
    return held


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * (_BYTES_OF_FLOATS if torch.is_floating_point(tensor) else tensor.element_size())


def _last(held: Tensor, window: int | None) -> Tensor:
    """The last positions of [B, K, T, E]."""
    return held if window is None else held[..., -window:, :]
