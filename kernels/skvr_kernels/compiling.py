"""The kernels compiled for GPUs that are not there: what becomes of registers, shared memory and matrix instructions.

Triton brings NVIDIA's assembler, so this needs no GPU. It cannot be done where Triton interprets.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skvr_kernels.attention import precision_of
from skvr_kernels.backward import keys_kernel, queries_kernel
from skvr_kernels.forward import forward_kernel
from skvr_kernels.tiles import Kernel, Tiles, tiles_for
from skvr_kernels.writing import unwrite_kernel, write_kernel

KERNELS: dict[Kernel, Any] = {
    "forward": forward_kernel,
    "queries": queries_kernel,
    "keys": keys_kernel,
    "write": write_kernel,
    "unwrite": unwrite_kernel,
}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Shared memory of a program, by compute capability (CUDA C++ Programming Guide, table of technical specifications)."""
_CONFIGURATIONS = ((torch.bfloat16, 64), (torch.bfloat16, 96), (torch.bfloat16, 128), (torch.bfloat16, 256),
                   (torch.float16, 128), (torch.float32, 64), (torch.float32, 128))  # fmt: skip
_GROUP = 2  # query heads of a key/value head: its value is a loop's length, and changes no tile
_ELSE = {  # of arguments that are neither in the arena's dtype nor known to the compiler
    "D_KV": "*fp32", "LSE": "*fp32", "DELTA": "*fp32", "D_WEIGHT": "*fp32", "COS": "*fp32", "SIN": "*fp32",
    "SLOT": "*i64", "FIRST": "*i32", "END": "*i32", "scale": "fp32", "eps": "fp32", "slots": "i32", "batch": "i32",
    "sequence": "i32", "heads": "i32", "kv_heads": "i32", "table_stride": "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel."""

    kernel: Kernel
    capability: int
    dtype: str
    head_size: int
    tiles: Tiles
    registers: int
    stack_bytes: int
    """Of each thread: what registers could not hold."""
    shared_bytes: int
    wgmma: int
    """Matrix instructions of Hopper's, in the program's text."""

    @property
    def misses(self) -> list[str]:
        """Limits that it does not keep."""
        found = []
        if self.stack_bytes > self.tiles.stack_bytes:
            found.append(f"spills {self.stack_bytes} bytes")
        if self.shared_bytes > SHARED_BYTES[self.capability]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory")
        if self._can_use_wgmma and not self.wgmma:
            found.append("has no wgmma")
        return found

    @property
    def _can_use_wgmma(self) -> bool:
        """Whether its tiles are large enough for Hopper's instructions, which take 64 rows, in a dtype of 16 bits."""
        rows = {"forward": self.tiles.queries, "queries": self.tiles.queries, "keys": self.tiles.keys}
        return 90 <= self.capability < 100 and self.dtype != "fp32" and rows.get(self.kernel, 0) >= 64


def configurations() -> Iterator[tuple[Kernel, int, torch.dtype, int]]:
    """Kernel, compute capability, dtype and head size of all that is looked at."""
    for capability in SHARED_BYTES:
        for dtype, head_size in _CONFIGURATIONS:
            for kernel in get_args(Kernel):
                yield kernel, capability, dtype, head_size


def compiled(kernel: Kernel, capability: int, dtype: torch.dtype, head_size: int) -> Compiled:
    """Compile a kernel with the tiles that it would have there."""
    function, tiles = KERNELS[kernel], tiles_for(kernel, capability, head_size, dtype)
    known = {
        "E": head_size,
        "BLOCK_E": max(16, triton.next_power_of_2(head_size)),
        "BLOCK_HALF": triton.next_power_of_2(head_size // 2),
        "GROUP": _GROUP,
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "ROWS": tiles.queries,
        "PRECISION": precision_of(dtype),
        "NORM": True,
        "ROTATE": True,
    }
    names = function.arg_names
    types = {name: "constexpr" if name in known else _ELSE.get(name, f"*{DTYPES[dtype]}") for name in names}
    # What torch allocates begins at multiples of 16 bytes; not told so, the compiler loads element by element.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
    source = ASTSource(function, types, {name: known[name] for name in names if name in known}, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(made.asm["cubin"])
    wgmma = made.asm["ptx"].count("wgmma.mma_async")
    return Compiled(kernel, capability, DTYPES[dtype], head_size, tiles, registers, stack, made.metadata.shared, wgmma)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as NVIDIA's tool reads them from a binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", said.stdout + said.stderr))
    return int(numbers["REG"]), int(numbers["STACK"])
