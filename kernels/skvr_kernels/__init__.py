"""Triton kernels for stochastic KV routing: attention in which every sequence reads a donor of its own."""

from skvr_kernels.arena import Arena, Documents, is_interpreted, require_possible
from skvr_kernels.attention import arena_token, attend, write

if is_interpreted():
    from skvr_kernels.interpreter import mend_bf16

    mend_bf16()

__version__ = "0.1.0"
__all__ = ["Arena", "Documents", "arena_token", "attend", "require_possible", "write"]
