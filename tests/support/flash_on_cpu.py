"""The contracts of flash kernels in plain PyTorch: of flash-attn's two functions, and of PyTorch's own operation.

With these in their place everything around the kernels is tested on a CPU; `tests/test_gpu.py` runs the kernels.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skvr_dist.model import decoder
from skvr_dist.model.attention_choice import Choice


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attend from q [B, S, H, E] to k and v [B, T, K, E]; the last query sees the last key, as in flash-attn >= 2.1."""
    assert dropout_p == 0 and not any(options.values()), options
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=softmax_scale, enable_gqa=True
    )
    return attended.transpose(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """Sequences one after the other in q [positions, H, E], k and v [positions, K, E]; int32 bounds [sequences + 1]."""
    for bounds, flat, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(flat)
        assert bounds.diff().max() <= longest
    outputs = [
        flash_attn_func(one_q[None], one_k[None], one_v[None], **options)[0]
        for one_q, one_k, one_v in zip(
            *(
                flat.split(bounds.diff().tolist())
                for flat, bounds in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
            ),
            strict=True,
        )
    ]
    return torch.cat(outputs)


def give_to_transformers(patch: pytest.MonkeyPatch) -> str:
    """Let transformers' flash attention call them; returns the name of that implementation."""
    name = "flash_attention_2_on_cpu"
    functions = (flash_attn_func, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    patch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    ALL_ATTENTION_FUNCTIONS.register(name, flash_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    return name


def _sequences(q_bounds: Tensor | None, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The sequences [S, H, E] that a call of PyTorch's operation is about, of each of its tensors."""
    if q_bounds is None:
        return list(zip(*tensors, strict=True))
    assert q_bounds.dtype == torch.int32 and q_bounds[0] == 0 and q_bounds[-1] == len(tensors[0])
    assert all(bounds.device == tensors[0].device for bounds in (q_bounds, *tensors))
    return list(zip(*(each.split(q_bounds.diff().tolist()) for each in tensors), strict=True))


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """[H, S, T] of q [S, H, E] and k [T, H, E]."""
    scores = torch.einsum("she,the->hst", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(k) - len(q))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, _: Tensor | None, longest: int, *__: Any
) -> tuple[Tensor, ...]:
    group, outputs = q.shape[-2] // k.shape[-2], []
    for one_q, one_k, one_v in _sequences(bounds, q, k, v):
        assert len(one_q) <= longest
        one_k, one_v = (x.repeat_interleave(group, dim=1) for x in (one_k, one_v))
        outputs.append(torch.einsum("hst,the->she", _weights(one_q, one_k), one_v))
    sums = q.new_zeros((len(q), q.shape[2], q.shape[1]) if bounds is None else (q.shape[1], len(q))).float()
    seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return (torch.stack if bounds is None else torch.cat)(outputs), sums, *seeds, q.new_empty(0)


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any, **also: Any) -> tuple[Tensor, ...]:
    bounds = others[2]  # after the output and the sums
    assert not any(also.values()), f"FA4 refuses windows in PyTorch 2.11: {also}"
    group, found = q.shape[-2] // k.shape[-2], []
    for d_out, one_q, one_k, one_v in _sequences(bounds, gradient, q, k, v):
        one_k, one_v = (x.repeat_interleave(group, dim=1) for x in (one_k, one_v))
        weights = _weights(one_q, one_k)
        d_weights = torch.einsum("she,the->hst", d_out, one_v)
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        d_k, d_v = torch.einsum("hst,she->the", d_scores, one_q), torch.einsum("hst,she->the", weights, d_out)
        ours = (x.unflatten(1, (-1, group)).sum(2) for x in (d_k, d_v))
        found.append((torch.einsum("hst,the->she", d_scores, one_k), *ours))
    return tuple(map(torch.stack if bounds is None else torch.cat, zip(*found, strict=True)))


def give_to_torch(patch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's operation for flash attention run on CPUs, and `model.attention` name it there."""
    operations = torch.library.Library("aten", "IMPL", "CPU")
    operations.impl("_flash_attention_forward", _forward)
    operations.impl("_flash_attention_backward", _backward)
    patch.setattr("support.flash_on_cpu._operations", operations, raising=False)  # it ends with its last reference
    for module in (decoder, sys.modules.get("skvr_dist.parallel.engine.engine")):
        if module:
            patch.setattr(module, "resolve", lambda wanted, *_: Choice(wanted, "a test says so"))
    patch.setattr(decoder, "activate", lambda name: None)
