"""FlashAttention 4 with the results that PyTorch takes from it.

PyTorch runs a module's `_flash_attn_fwd` and `_flash_attn_bwd`. From 4.0.0b20 on the first of flash-attn-4 returns more
than the output and the logarithms of its sums, and PyTorch before 2.14 takes two results and no more. So it is given
this module in place of `flash_attn.cute.interface` (`skvr_dist.model.attention_choice.activate`).
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

_interface = importlib.import_module("flash_attn.cute.interface")
_flash_attn_bwd = _interface._flash_attn_bwd


def _flash_attn_fwd(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, logsumexp, *_ = _interface._flash_attn_fwd(*arguments, **options)
    return out, logsumexp
