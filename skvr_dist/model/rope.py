"""Rotary position embeddings (RoFormer, arXiv 2104.09864), with the frequency scalings that are published.

Shapes: B batch, S sequence, H heads, E head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skvr_dist.config.model import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """float32 [E / 2]: radians per position of each rotated pair."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies if config.rope_scaling is None else _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between interpolated
    # (transformers' modeling_rope_utils defines the published form; this order of operations gives the same bits).
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    assert low is not None and high is not None and context is not None  # RopeScaling checked it
    turns_in_context = context / (2 * math.pi / frequencies)
    keep = ((turns_in_context - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * frequencies / scaling.factor + keep * frequencies


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., E] whatever the model's dtype.

    In bf16 neighbouring positions beyond 256 would share an angle.

    Args:
        positions: integer [S], or [B, S] if they differ between sequences.
    """
    angles = positions.float()[..., None] * inverse_frequencies(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [B, S, H, E] by the tables [S, E] or [B, S, E]; computed in float32, returned in the dtype of x."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (wide * cos[..., None, :] + rotated * sin[..., None, :]).to(x.dtype)
