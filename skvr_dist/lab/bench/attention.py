"""Time of attention on a GPU: our kernel beside PyTorch's, forwards and backwards, at several shapes.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from skvr_kernels import Arena, Documents, arena_token, attend
from torch import Tensor
from triton.testing import do_bench

from skvr_dist.model import attention
from skvr_dist.model.attention_choice import activate

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
        self.k, self.v = (self.arena.kv[:, i].clone().requires_grad_() for i in (0, 1))  # [layers, B, S, K, E]
        places = torch.arange(shape.batch, device="cuda")
        self.slot = places % self.LAYERS if shape.donors_of_each else torch.zeros_like(places)
        self.reads = self.slot.tolist()
        self.rows = self.slot * shape.batch + places  # in [layers x B]
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
                self._flash(self.q[b : b + 1], self.k[layer, b : b + 1], self.v[layer, b : b + 1], self.bounds_of_one)
                for b, layer in enumerate(self.reads)
            ]
            return torch.cat(parts)
        if way.endswith("gathered copy"):
            k, v = (kv.flatten(0, 1).index_select(0, self.rows) for kv in (self.k, self.v))
            return self._flash(self.q, k, v, self.bounds)
        return self._flash(self.q, self.k[0], self.v[0], self.bounds)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return attention.attend(q, k, v, attention.AttentionScope("fa2", bounds=bounds, longest=self.longest))

    def _without_flash(self) -> Tensor:
        """What a mask leaves: the kernel that holds no scores, if it takes grouped heads, and else the formula."""
        q, k, v = (each.transpose(1, 2) for each in (self.q, self.k[0], self.v[0]))
        numbers = self.documents.first
        mask = (numbers[:, :, None] == numbers[:, None]).tril()[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def gradients(self, way: Way, out: Tensor) -> list[Tensor]:
        """A backward pass: gradients of queries, keys and values; ours of keys and values are added up in the arena."""
        wanted = [self.q] if way == "own" else [self.q, self.k, self.v]
        return list(torch.autograd.grad(out, wanted, self.gradient, retain_graph=True))

    def require_right(self, way: Way) -> None:
        """Compare outputs and gradients with the formula in float32.

        Raises:
            ArithmeticError: one of them is more than 1 % off.
        """
        leaves = [each.detach().float().requires_grad_() for each in (self.q, self.k, self.v)]
        exact = self._exact(*leaves)
        gradients = torch.autograd.grad(exact, leaves, self.gradient.float())
        self.arena.gradients.zero_()
        out = self.output(way)
        found = self.gradients(way, out)
        if way == "own":
            found += self.arena.gradients.unbind(1)
        names = ("outputs", "gradients of queries", "gradients of keys", "gradients of values")
        for name, mine, right in zip(names, (out, *found), (exact, *gradients), strict=True):
            error = float((mine.detach().float() - right.detach()).norm() / right.detach().norm())
            if not error <= 1e-2:
                raise ArithmeticError(f"{way} at {self.shape}: {name} are {error:.1e} off the formula, more than 1e-2")

    def _exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The formula [B, S, H, E], a sequence at a time."""
        first, outputs = self.documents.first, []
        for b, layer in enumerate(self.reads):
            one_q, one_k, one_v = (each.transpose(0, 1)[None] for each in (q[b], k[layer, b], v[layer, b]))
            mask = (first[b, :, None] == first[b]).tril()
            out = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=mask, enable_gqa=True)
            outputs.append(out.transpose(1, 2))
        return torch.cat(outputs)


@contextmanager
def _implementation(way: Way) -> Iterator[None]:
    """PyTorch's flash attention computed by that package, for a while."""
    if not way.startswith("FA4"):
        yield
        return
    activate("fa4")
    try:
        yield
    finally:
        activate("fa2")


def attention_times(shape: Shape, ways: Sequence[Way], rounds: int, milliseconds: int) -> list[Times]:
    """Time all ways in turn, so that what the GPU's clock does meets all of them; each is checked first.

    Args:
        milliseconds: for which each measurement repeats its kernel.

    Raises:
        ArithmeticError: outputs or gradients are more than 1 % off the formula.
    """
    inputs, times = _Inputs(shape), [Times(way) for way in ways]
    for number in range(rounds):
        for offset in range(len(ways)):
            each = times[(number + offset) % len(ways)]
            with _implementation(each.way):
                if number == 0:
                    inputs.require_right(each.way)
                with torch.no_grad():
                    each.forward.append(_milliseconds(partial(inputs.output, each.way), milliseconds))
                backward = partial(inputs.gradients, each.way, inputs.output(each.way))
                each.backward.append(_milliseconds(backward, milliseconds))
    return times


def _milliseconds(run: Callable[[], object], milliseconds: int) -> float:
    return float(do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="median"))
