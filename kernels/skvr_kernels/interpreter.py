"""Triton's interpreter, set right for bf16.

It keeps bf16 as 16-bit integers. Products of matrices multiply these integers, and casts cut numbers off where every
GPU rounds them; neither says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter


def mend_bf16() -> None:
    """Let the interpreter of this process multiply the numbers that bf16 stands for, and round to the nearest."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded(source.data), tl.bfloat16)
        return (
            _widened(source)
            if (source.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32)
            else cast(self, source, to)
        )

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_ext = builder.create_fp_trunc = cast_impl


def _widened(handle: Any) -> Any:
    """A handle of bf16 as float32; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bf16 of float32 numbers, ties to even, as its 16 bits."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)
