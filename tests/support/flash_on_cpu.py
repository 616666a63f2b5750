"""The contract of flash-attn's two functions in plain PyTorch: its own kernels run on GPUs alone.

With these in their place everything around the kernels is tested on a CPU; `tests/test_gpu.py` runs the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


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
