"""Routed attention under Triton's interpreter, against the formula in float64 and beside SDPA in the same dtype.

Shapes: B batch, S sequence, H query heads, K key/value heads, E head size.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass

import pytest
import skvr_kernels
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from skvr_kernels import Arena, Documents, arena_token
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skvr_dist.model.rope import rotate

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Shape:
    """A micro-batch: sizes, the slot that each sequence reads for each reader, the document of each position."""

    dtype: torch.dtype
    kv_heads: int
    group: int
    head_size: int
    reads: list[list[int]]
    """[readers][B], in each the newest or an older slot."""
    documents: list[list[int]]
    """[B][S]."""

    @property
    def slots(self) -> int:
        return max(max(row) for row in self.reads) + 1


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    batch, sequence = draw(st.integers(1, 2)), draw(st.integers(1, 18))
    readers = draw(st.integers(1, 9))
    slots = draw(st.integers(1, min(readers, 3)))
    steps = draw(
        st.lists(st.lists(st.booleans(), min_size=sequence, max_size=sequence), min_size=batch, max_size=batch)
    )
    return Shape(
        dtype=draw(st.sampled_from(list(BOUNDS))),
        kv_heads=draw(st.integers(1, 2 if readers < 4 else 1)),  # the interpreter is slow
        group=draw(st.sampled_from([1, 2])),
        head_size=draw(st.sampled_from([8, 16, 24])),
        reads=[[draw(st.integers(0, slots - 1)) for _ in range(batch)] for _ in range(readers)],
        documents=[torch.tensor(row).cumsum(0).tolist() for row in steps],
    )


@dataclass(frozen=True)
class Tensors:
    """Inputs of a micro-batch, and the gradients that reach its outputs."""

    keys: list[Tensor]
    values: list[Tensor]
    queries: list[Tensor]
    d_outs: list[Tensor]

    def leaves(self, dtype: torch.dtype) -> Tensors:
        """The same as leaves of a graph in another dtype."""

        def copied(tensors: list[Tensor]) -> list[Tensor]:
            return [each.detach().to(dtype).requires_grad_() for each in tensors]

        return Tensors(copied(self.keys), copied(self.values), copied(self.queries), [d.to(dtype) for d in self.d_outs])

    def gradients(self) -> Tensor:
        """Those of all inputs, in one vector."""
        inputs = (*self.keys, *self.values, *self.queries)
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in inputs]
        return torch.cat([each.double().flatten() for each in found])


def random_tensors(shape: Shape) -> Tensors:
    generator = torch.Generator().manual_seed(len(shape.reads) + 100 * len(shape.documents[0]))
    batch, sequence = len(shape.documents), len(shape.documents[0])

    def drawn(count: int, heads: int) -> list[Tensor]:
        size = (batch, sequence, heads, shape.head_size)
        return [torch.randn(size, generator=generator).to(shape.dtype) for _ in range(count)]

    heads = shape.kv_heads * shape.group
    readers = len(shape.reads)
    return Tensors(*(drawn(shape.slots, shape.kv_heads) for _ in range(2)), *(drawn(readers, heads) for _ in range(2)))


def routed(shape: Shape, inputs: Tensors) -> Tensor:
    """All outputs in one vector; the inputs have their gradients afterwards."""
    batch, sequence = len(shape.documents), len(shape.documents[0])
    arena = Arena(shape.slots, batch, sequence, shape.kv_heads, shape.head_size, dtype=shape.dtype, device="cpu")
    documents, token, outs = Documents.of(torch.tensor(shape.documents)), arena_token("cpu"), []
    for slot, (k, v) in enumerate(zip(inputs.keys, inputs.values, strict=True)):
        token = skvr_kernels.write(arena, torch.full((batch,), slot), k, v, token)
    for q, reads in zip(inputs.queries, shape.reads, strict=True):
        out, token = skvr_kernels.attend(arena, torch.tensor(reads), q, documents, token)
        outs.append(out)
    torch.autograd.backward(outs, inputs.d_outs)
    assert not arena.gradients.any(), "what was read must be zero for the next micro-batch"
    return torch.cat([out.detach().double().flatten() for out in outs])


def by_sdpa(shape: Shape, inputs: Tensors) -> Tensor:
    """The same on gathered copies, in the dtype of the inputs."""
    numbers = torch.tensor(shape.documents)
    size = numbers.shape[1]
    mask = (numbers[:, None, :, None] == numbers[:, None, None, :]) & torch.ones(size, size, dtype=torch.bool).tril()
    outs = []
    for q, reads in zip(inputs.queries, shape.reads, strict=True):
        k = torch.stack([inputs.keys[slot][b] for b, slot in enumerate(reads)])
        v = torch.stack([inputs.values[slot][b] for b, slot in enumerate(reads)])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2))
    torch.autograd.backward(outs, inputs.d_outs)
    return torch.cat([out.detach().double().flatten() for out in outs])


def relative(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def test_outputs_and_gradients_are_those_of_the_formula() -> None:
    """Grouped heads, documents, odd lengths, slots of each sequence, one to nine readers.

    Each case keeps to the bound of its dtype; over all, errors are at most 1.2 times those of SDPA in that dtype.
    """
    squares: dict[torch.dtype, list[tuple[float, float]]] = defaultdict(list)

    @given(shape=shapes())
    @settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    def compare(shape: Shape) -> None:
        inputs = random_tensors(shape)
        ours, sdpa, right = inputs.leaves(shape.dtype), inputs.leaves(shape.dtype), inputs.leaves(torch.float64)
        outs = [routed(shape, ours), by_sdpa(shape, sdpa), by_sdpa(shape, right)]
        gradients = [each.gradients() for each in (ours, sdpa, right)]
        for found, theirs, wanted in (outs, gradients):
            error = relative(found, wanted)
            assert error <= BOUNDS[shape.dtype]
            if len(shape.documents[0]) > 1:  # of a single position SDPA copies the values, where nothing is rounded
                squares[shape.dtype].append((error**2, relative(theirs, wanted) ** 2))

    compare()
    assert set(squares) == set(BOUNDS)
    for dtype, pairs in squares.items():
        mine, theirs = (sum(column) ** 0.5 for column in zip(*pairs, strict=True))
        assert mine <= 1.2 * theirs, (dtype, mine, theirs)


@pytest.mark.parametrize("tables", [(), (1,), (2,)])
def test_keys_are_normed_and_rotated_on_their_way(tables: tuple[int, ...]) -> None:
    batch, sequence, heads, size = 2, 19, 2, 24
    angles = torch.randn(*tables, sequence, size // 2).repeat_interleave(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    k, v, weight = (
        torch.randn(batch, sequence, heads, size),
        torch.randn(batch, sequence, heads, size),
        torch.randn(size),
    )
    arena = Arena(2, batch, sequence, heads, size, dtype=torch.float32, device="cpu")
    leaves = [each.clone().requires_grad_() for each in (k, v, weight)]
    rights = [each.clone().requires_grad_() for each in (k, v, weight)]
    slot = torch.tensor([1, 0])
    norm = leaves[2].repeat_interleave(2)[::2], 1e-5  # not contiguous
    token = skvr_kernels.write(arena, slot, *leaves[:2], arena_token("cpu"), norm=norm, rope=(cos, sin))
    wanted = rotate(F.rms_norm(rights[0], (size,), rights[2], 1e-5), cos, sin)
    torch.testing.assert_close(arena.kv[slot, 0, [0, 1]], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(arena.kv[slot, 1, [0, 1]], v)
    d_k, d_v = torch.randn_like(k), torch.randn_like(v)
    arena.gradients[slot, 0, [0, 1]], arena.gradients[slot, 1, [0, 1]] = d_k, d_v
    token.backward()
    torch.autograd.backward([wanted, rights[1]], [d_k, d_v])
    for found, right in zip(leaves, rights, strict=True):
        assert found.grad is not None and right.grad is not None
        torch.testing.assert_close(found.grad, right.grad, rtol=1e-5, atol=1e-5)
    assert not arena.gradients.any()


def test_the_same_bits_every_time() -> None:
    shape = Shape(torch.float32, 1, 2, 8, [[0], [0]], [[0] * 17])
    inputs = random_tensors(shape)
    first, second = inputs.leaves(shape.dtype), inputs.leaves(shape.dtype)
    assert torch.equal(routed(shape, first), routed(shape, second))
    assert torch.equal(first.gradients(), second.gradients())


def test_micro_batches_under_way_at_once_and_layers_computed_again() -> None:
    """Two micro-batches share an arena of gradients, and their layers run once more in the backward pass."""
    shape = Shape(torch.float32, 1, 1, 8, [[0], [0]], [[0] * 5])
    inputs = [random_tensors(shape), random_tensors(shape)]
    inputs[1].keys[0].mul_(-1)
    alone = [each.leaves(shape.dtype) for each in inputs]
    for each in alone:
        routed(shape, each)
    together, gradients, outs = [each.leaves(shape.dtype) for each in inputs], None, []
    slot, documents = torch.tensor([0]), Documents.joined(1, 5, "cpu")
    for each in together:
        arena = Arena(1, 1, 5, 1, 8, dtype=torch.float32, device="cpu", gradients=gradients)
        gradients = arena.gradients

        def layer(q: Tensor, kv: tuple[Tensor, Tensor] | None, token: Tensor, arena: Arena) -> tuple[Tensor, Tensor]:
            token = token if kv is None else skvr_kernels.write(arena, slot, *kv, token)
            return skvr_kernels.attend(arena, slot, q, documents, token)

        again = functools.partial(checkpoint, layer, use_reentrant=False)
        first, token = again(each.queries[0], (each.keys[0], each.values[0]), arena_token("cpu"), arena)
        second, _ = again(each.queries[1], None, token, arena)
        outs.append([first, second])
    for found, each, wanted in zip(outs, together, alone, strict=True):
        torch.autograd.backward(found, each.d_outs)
        assert torch.equal(each.gradients(), wanted.gradients())


def test_documents_have_bounds_of_fixed_shapes() -> None:
    documents = Documents.of(torch.tensor([[0, 0, 1, 1, 1, 4], [2, 2, 2, 2, 2, 2]]))
    assert documents.first.tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    assert documents.end.tolist() == [[2, 2, 5, 5, 5, 6], [6] * 6]
    documents.require_consistent()
    joined = Documents.joined(1, 3, "cpu")
    assert (joined.first.tolist(), joined.end.tolist()) == ([[0, 0, 0]], [[3, 3, 3]])


def test_a_slot_that_is_none_is_refused_when_debugging_and_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(1, 2, 3, 1, 8, dtype=torch.float32, device="cpu")
    k, slot = torch.ones(2, 3, 1, 8), torch.tensor([0, 1])
    token = skvr_kernels.write(arena, torch.tensor([0, 0]), k, k, arena_token("cpu"))
    out, _ = skvr_kernels.attend(arena, slot, k, Documents.joined(2, 3, "cpu"), token)
    assert torch.equal(out[0], k[0]) and out[1].isnan().all()
    leaf = k.clone().requires_grad_()
    skvr_kernels.write(arena, slot, leaf, leaf, arena_token("cpu")).backward()
    assert leaf.grad is not None and not leaf.grad[0].any() and leaf.grad[1].isnan().all()
    monkeypatch.setenv("SKVR_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="sequence 1 has slot 1, but the arena has slots 0 to 0"):
        skvr_kernels.attend(arena, slot, k, Documents.joined(2, 3, "cpu"), token)
    with pytest.raises(ValueError, match="sequence 1 has slot 1"):
        skvr_kernels.write(arena, slot, k, k, token)
    wrong = Documents(torch.tensor([[0, 2, 2]] * 2).int(), torch.tensor([[1, 3, 3]] * 2).int())
    with pytest.raises(ValueError, match=r"sequence 0, position 1: it sees keys from 2 on .* Documents\.of"):
        skvr_kernels.attend(arena, torch.tensor([0, 0]), k, wrong, token)
    arena.gradients[0, 0, 0, 0] = 1.0
    with pytest.raises(ValueError, match=r"gradients that this arena shares are not zero: .* call zero_\(\) on them"):
        Arena(1, 2, 3, 1, 8, dtype=torch.float32, device="cpu", gradients=arena.gradients)


def test_the_only_bounds_that_debugging_accepts_are_those_of_documents() -> None:
    """Every pair for 4 positions in which each sees itself, of which 8 are ways to cut them into documents."""
    right = {tuple(map(tuple, bounds_of(numbers))) for numbers in itertools.product((0, 1), (0, 1), (0, 1))}
    accepted = set()
    ranges = [*(range(i + 1) for i in range(4)), *(range(i + 1, 5) for i in range(4))]
    for numbers in itertools.product(*ranges):
        first, end = numbers[:4], numbers[4:]
        try:
            Documents(torch.tensor([first]).int(), torch.tensor([end]).int()).require_consistent()
        except ValueError:
            continue
        accepted.add((first, end))
    assert accepted == right and len(right) == 8


def bounds_of(steps: tuple[int, ...]) -> list[list[int]]:
    """First and end of each position, where a document begins at every step of 1."""
    documents = Documents.of(torch.tensor([[0, *steps]]).cumsum(1))
    return [documents.first[0].tolist(), documents.end[0].tolist()]


def test_what_no_kernel_can_do_is_refused() -> None:
    def arena(head_size: int = 8, dtype: torch.dtype = torch.float32) -> object:
        return Arena(1, 1, 4, 1, head_size, dtype=dtype, device="cpu")

    with pytest.raises(ValueError, match="even head sizes up to 128 in float32, not 256"):
        arena(256)
    with pytest.raises(ValueError, match="even head sizes up to 256 in bfloat16, not 33"):
        arena(33, torch.bfloat16)
    with pytest.raises(ValueError, match="takes bfloat16, float16, float32, not float64"):
        arena(dtype=torch.float64)
    made = Arena(1, 1, 4, 2, 8, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="H a multiple of the 2 heads of keys"):
        skvr_kernels.attend(
            made, torch.tensor([0]), torch.ones(1, 4, 3, 8), Documents.joined(1, 4, "cpu"), arena_token("cpu")
        )
    with pytest.raises(
        ValueError, match=r"keys are torch.float32 \(1, 4, 1, 8\) on cpu, for the arena they must be .*2, 8"
    ):
        skvr_kernels.write(made, torch.tensor([0]), torch.ones(1, 4, 1, 8), torch.ones(1, 4, 2, 8), arena_token("cpu"))
    keys, joined = torch.ones(1, 4, 2, 8), Documents.joined(1, 4, "cpu")
    with pytest.raises(ValueError, match=r"slots are torch.int32 \(1,\), they must be contiguous torch.int64 \(1,\)"):
        skvr_kernels.attend(made, torch.tensor([0]).int(), keys, joined, arena_token("cpu"))
    with pytest.raises(ValueError, match=r"bounds of documents are torch.int32 \(1, 5\), .* Documents\.of"):
        skvr_kernels.attend(made, torch.tensor([0]), keys, Documents.joined(1, 5, "cpu"), arena_token("cpu"))
    table = torch.ones(4, 8)
    for norm, rope, words in (
        ((torch.ones(4), 1e-6), None, r"weight of the norm is \(4,\), .* must be \(8,\)"),
        (
            None,
            (table[:, :4], table[:, :4]),
            r"tables .* torch.float32 \(4, 4\) and .* both must be torch.float32 \(4, 8\)",
        ),
        (None, (table, table[None]), r"\(4, 8\) and torch.float32 \(1, 4, 8\)"),
        (None, (table.double(), table.double()), r"torch.float64 \(4, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            skvr_kernels.write(made, torch.tensor([0]), keys, keys, arena_token("cpu"), norm=norm, rope=rope)
    with pytest.raises(ValueError, match="keys have 40000 x 2 heads, more than the 65535 of one launch"):
        many = Arena(1, 40_000, 1, 2, 2, dtype=torch.float32, device="cpu")
        skvr_kernels.write(many, torch.zeros(40_000).long(), many.kv[0, 0], many.kv[0, 1], arena_token("cpu"))
    with pytest.raises(ValueError, match=r"its gradients are .*; give float32 ones of the same shape"):
        Arena(2, 1, 4, 2, 8, dtype=torch.float32, device="cpu", gradients=made.gradients)
