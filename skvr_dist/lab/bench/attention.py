"""Time of attention on a GPU: our kernel beside PyTorch's, forwards and backwards, at several shapes.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from skvr_kernels import Arena, Documents, arena_token, attend
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
from triton.testing import do_bench

Way = Literal["own", "FA2", "FA4", "FA2 on views", "FA2 on a gathered copy", "FA4 on a gathered copy", "SDPA, no flash"]
"""How attention is computed. `own` reads every sequence's donor from the arena; the others have the keys and values as
one tensor, so that donors of each sequence are gathered first, or read one call per sequence."""


@dataclass(frozen=True)
class Shape:
    """Of a micro-batch of one layer."""

    batch: int
    sequence: int
    query_heads: int = 16
    kv_heads: int = 8
    head_size: int = 128
    document: int = 0
    """Positions of a document; 0: all of a sequence is one."""
    donors_of_each: bool = False
    """Whether sequences have donors each."""

    def __str__(self) -> str:
        documents = f", documents of {self.document}" if self.document else ""
        return f"{self.batch} x {self.sequence:,}{documents}{', donors of each' if self.donors_of_each else ''}"

    @property
    def operations(self) -> float:
        """Of the forward pass, causal; the backward pass has 2.5 times as many."""
        length = self.document or self.sequence
        return 2 * self.batch * self.sequence * length * self.query_heads * self.head_size

    def ways(self, has_fa4: bool) -> list[Way]:
        """Those that can be compared at this shape."""
        if self.donors_of_each:
            ways: list[Way] = ["own", "FA2 on views", "FA2 on a gathered copy"]
            return [*ways, "FA4 on a gathered copy"] if has_fa4 else ways
        ways = ["own", "FA2", "SDPA, no flash"]
        return [*ways, "FA4"] if has_fa4 else ways


SHAPES = (
    Shape(1, 4096),
    Shape(1, 4096, document=512),
    Shape(4, 1024),
    *(Shape(8192 // s, s, donors_of_each=True) for s in (256, 512, 1024, 4096)),
)
"""Heads of Qwen3-1.7B."""


@dataclass
class Times:
    """Milliseconds of one way at one shape, in the order of the rounds."""

    way: Way
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def ratio_to(self, other: Times, direction: str) -> float:
        """Median over the rounds of the other's time over this one's: above 1, this one is faster."""
        pairs = zip(getattr(self, direction), getattr(other, direction), strict=True)
        return statistics.median(theirs / mine for mine, theirs in pairs)


class _Inputs:
    """Queries, and the keys and values of four layers, of which each sequence reads one."""

    LAYERS = 4

    def __init__(self, shape: Shape) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        sizes = (shape.batch, shape.sequence, shape.query_heads, shape.head_size)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device="cuda", dtype=torch.bfloat16)

        self.shape = shape
        self.q = draw(*sizes).requires_grad_()
        self.gradient = draw(*sizes)
        self.arena = Arena(
            self.LAYERS, *sizes[:2], shape.kv_heads, shape.head_size, dtype=torch.bfloat16, device="cuda"
        )
        self.arena.kv.copy_(draw(*self.arena.kv.shape))
        # As layers leave them: tensors of their own. In the arena they would lie as well, but only ours reads it.
        self.k, self.v = ([kv[i].clone().requires_grad_() for kv in self.arena.kv] for i in (0, 1))
        places = torch.arange(shape.batch, device="cuda")
        self.slot = places % self.LAYERS if shape.donors_of_each else torch.zeros_like(places)
        self.reads = self.slot.tolist()
        length = shape.document or shape.sequence
        numbers = torch.arange(shape.sequence, device="cuda") // length
        self.documents = Documents.of(numbers.expand(shape.batch, -1))
        self.bounds = torch.arange(0, shape.batch * shape.sequence + 1, length, device="cuda", dtype=torch.int32)
        self.bounds_of_one = torch.arange(0, shape.sequence + 1, length, device="cuda", dtype=torch.int32)
        self.longest = length

    def output(self, way: Way) -> Tensor:
        """Attention [B, S, H, E] in that way."""
        if way == "own":
            return attend(self.arena, self.slot, self.q, self.documents, arena_token("cuda"))[0]
        if way == "SDPA, no flash":
            return self._without_flash()
        if way == "FA2 on views":
            parts = [
                self._flash(self.q[b : b + 1], self.k[layer][b : b + 1], self.v[layer][b : b + 1], self.bounds_of_one)
                for b, layer in enumerate(self.reads)
            ]
            return torch.cat(parts)
        if way.endswith("gathered copy"):
            k, v = (torch.stack([kv[layer][b] for b, layer in enumerate(self.reads)]) for kv in (self.k, self.v))
            return self._flash(self.q, k, v, self.bounds)
        return self._flash(self.q, self.k[0], self.v[0], self.bounds)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        # What `varlen_attn` calls; PyTorch 2.11 gives that windows, which FA4 refuses in the backward pass.
        flat = (each.flatten(0, 1) for each in (q, k, v))
        lengths = bounds, bounds, self.longest, self.longest
        return torch.ops.aten._flash_attention_forward(*flat, *lengths, 0.0, True, False)[0].view_as(q)

    def _without_flash(self) -> Tensor:
        """What a mask leaves: the kernel that holds no scores, if it takes grouped heads, and else the formula."""
        q, k, v = (each.transpose(1, 2) for each in (self.q, self.k[0], self.v[0]))
        numbers = self.documents.first
        mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def all_gradients(self) -> list[Tensor]:
        """What a backward pass is asked for."""
        return [self.q, *self.k, *self.v]

    def exact(self) -> Tensor:
        """The formula in float32 on the GPU [B, S, H, E], a sequence at a time."""
        outputs = []
        for b, layer in enumerate(self.reads):
            q, k, v = (each[b : b + 1].float().transpose(1, 2) for each in (self.q, self.k[layer], self.v[layer]))
            first = self.documents.first[b]
            mask = (first[:, None] == first).tril()
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2))
        return torch.cat(outputs)


@contextmanager
def _implementation(way: Way) -> Iterator[None]:
    """PyTorch's flash attention computed by that package, for a while."""
    if not way.startswith("FA4"):
        yield
        return
    activate_flash_attention_impl("FA4")
    try:
        yield
    finally:
        restore_flash_attention_impl()


@torch.no_grad()
def _require_right(way: Way, found: Tensor, inputs: _Inputs) -> None:
    exact = inputs.exact()
    error = float((found.float() - exact).norm() / exact.norm())
    if not error <= 1e-2:
        raise ArithmeticError(f"{way} at {inputs.shape} is {error:.1e} off the formula, more than 1e-2")


def attention_times(shape: Shape, ways: Sequence[Way], rounds: int, milliseconds: int) -> list[Times]:
    """Time all ways in turn, so that what the GPU's clock does meets all of them; each is checked first.

    Args:
        milliseconds: for which each measurement repeats its kernel.

    Raises:
        ArithmeticError: a way is more than 1 % off the formula.
    """
    inputs, times = _Inputs(shape), [Times(way) for way in ways]
    for number in range(rounds):
        for offset in range(len(ways)):
            each = times[(number + offset) % len(ways)]
            with _implementation(each.way):
                out = inputs.output(each.way)
                if number == 0:
                    _require_right(each.way, out, inputs)

                def forward(way: Way = each.way) -> Tensor:
                    with torch.no_grad():
                        return inputs.output(way)

                def backward(out: Tensor = out, way: Way = each.way) -> None:
                    wanted = [inputs.q] if way == "own" else inputs.all_gradients()
                    torch.autograd.grad(out, wanted, inputs.gradient, retain_graph=True, allow_unused=True)

                each.forward.append(_milliseconds(forward, milliseconds))
                each.backward.append(_milliseconds(backward, milliseconds))
    return times


def _milliseconds(run: Callable[[], object], milliseconds: int) -> float:
    return float(do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="median"))
