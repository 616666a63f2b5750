"""The loss in chunks against torch's cross entropy and autograd in fp64, on one rank and over several."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skvr_dist.commands.bench import loss as command
from skvr_dist.lab.bench.loss import Sizes, in_chunks, memory_of
from skvr_dist.lab.verify.ranks import run_ranks
from skvr_dist.model import loss as module
from skvr_dist.model.loss import (
    IGNORED,
    MOST_CHUNK_BYTES,
    Objective,
    Rows,
    Teacher,
    chunks,
    compiled_elements,
    linear_loss,
)


@dataclass(frozen=True)
class Example:
    """A loss on random numbers."""

    seed: int
    tokens: int = 7
    hidden: int = 5
    vocabulary: int = 11
    labelled: float = 0.7
    weighted: bool = False
    z_loss: float = 0.0
    soft_cap: float | None = None
    taught: float | None = None
    temperature: float = 1.0
    own_head: bool = False
    chunk_elements: int = 2**26
    backend: str | None = None
    """Of torch.compile; what it would compile runs as it is here."""

    def made(self) -> tuple[Tensor, Tensor, Objective]:
        """Hidden states [2, N, D], head [V, D] and the objective, in fp64; labels that mostly are to be predicted."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, head = draw(2, self.tokens, self.hidden), draw(self.vocabulary, self.hidden)
        labels = torch.randint(0, self.vocabulary, (2, self.tokens), generator=generator)
        labels[torch.rand(labels.shape, generator=generator) > self.labelled] = IGNORED
        teacher = None
        if self.taught is not None:
            size = self.hidden if self.own_head else self.hidden + 2
            own = None if self.own_head else draw(self.vocabulary, size)
            cap = None if self.soft_cap is None else 2 * self.soft_cap
            teacher = Teacher(draw(2, self.tokens, size), own, self.taught, self.temperature, cap)
        weights = draw(2, self.tokens).abs() if self.weighted else None
        return hidden, head, Objective(labels, weights, teacher, self.z_loss, self.soft_cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()


def literal(hidden: Tensor, head: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """The same losses from all logits, as the formula has them."""
    logits = capped(hidden @ head.T, objective.soft_cap)
    labels, teacher = objective.labels, objective.teacher
    kept = labels != IGNORED
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    entropy, divergence, share = entropy.view(labels.shape), torch.zeros_like(logits[..., 0]), 0.0
    if teacher:
        taught = capped(teacher.hidden @ (head.detach() if teacher.head is None else teacher.head).T, teacher.soft_cap)
        target = (taught / teacher.temperature).softmax(-1)
        student = (logits / teacher.temperature).log_softmax(-1)
        divergence = F.kl_div(student, target, reduction="none").sum(-1) * kept
        share = teacher.weight * teacher.temperature**2
    mixed = (1 - (teacher.weight if teacher else 0)) * entropy + share * divergence
    mixed = (mixed + objective.z_loss * logits.logsumexp(-1) ** 2) * kept
    return (mixed if objective.weights is None else mixed * objective.weights).sum(), entropy, divergence


def wanted(example: Example) -> list[Tensor]:
    """Total, cross entropy, divergence, and the gradients of hidden states and head of 3 times the total."""
    hidden, head, objective = example.made()
    found = literal(hidden.requires_grad_(), head.requires_grad_(), objective)
    (3 * found[0]).backward()
    assert hidden.grad is not None and head.grad is not None
    return [*(each.detach() for each in found), hidden.grad, head.grad]


def in_parts(example: Example) -> list[Tensor]:
    """The same from the loss in chunks, of this rank's rows of the head where there are several ranks."""
    hidden, head, objective = example.made()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = -(-example.vocabulary // ranks)
    held = range(rank * count, min((rank + 1) * count, example.vocabulary))
    rows = Rows(held, dist.group.WORLD if ranks > 1 else None)

    def mine(whole: Tensor) -> Tensor:
        padding = torch.full((count - len(held), whole.shape[1]), 1e9, dtype=whole.dtype)  # never looked at
        return torch.cat((whole[held.start : held.stop], padding)) if len(padding) else whole[held.start : held.stop]

    if objective.teacher and objective.teacher.head is not None:
        teacher = dataclasses.replace(objective.teacher, head=mine(objective.teacher.head))
        objective = dataclasses.replace(objective, teacher=teacher)
    own = mine(head).clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(module, "CHUNK_ELEMENTS", example.chunk_elements)
        patch.setattr(module, "COMPILED_CHUNK_BYTES", 8 * example.chunk_elements)
        losses = linear_loss(hidden.requires_grad_(), own, objective, rows, example.backend)
    (3 * losses.total).backward()
    assert hidden.grad is not None and own.grad is not None
    assert not own.grad[len(held) :].any()
    return [*(each.detach() for each in losses), hidden.grad, own.grad[: len(held)]]


examples = st.builds(
    Example,
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 13),
    labelled=st.sampled_from([0.0, 0.5, 1.0]),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.3]),
    soft_cap=st.sampled_from([None, 3.0]),
    taught=st.sampled_from([None, 0.0, 0.4, 1.0]),
    temperature=st.sampled_from([1.0, 2.5]),
    own_head=st.booleans(),
    chunk_elements=st.sampled_from([1, 40, 2**26]),
    backend=st.sampled_from([None, "inductor"]),
)


@settings(deadline=None, max_examples=60)
@given(example=examples)
def test_on_one_rank(example: Example) -> None:
    for found, right in zip(in_parts(example), wanted(example), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


SOME = [
    Example(1),
    Example(2, weighted=True, z_loss=0.2, soft_cap=2.0, chunk_elements=12),
    Example(3, taught=0.4, temperature=2.0, chunk_elements=20),
    Example(4, taught=1.0, own_head=True, soft_cap=4.0, weighted=True),
    Example(5, labelled=0.0, taught=0.5, z_loss=0.1),
    Example(6, weighted=True, z_loss=0.2, soft_cap=2.0, chunk_elements=12, backend="inductor"),
    Example(7, weighted=True, taught=0.4, temperature=2.0, soft_cap=2.0, chunk_elements=12, backend="inductor"),
]


def parts_of_all(some: list[Example]) -> list[list[Tensor]]:
    return [in_parts(example) for example in some]


@pytest.mark.parametrize("ranks", [2, 4])
def test_over_tensor_parallel_ranks(ranks: int) -> None:
    """The last rank's rows are padded; losses are whole on each, gradients the parts of each."""
    by_rank = run_ranks(ranks, parts_of_all, SOME)
    for example, *parts in zip(SOME, *by_rank, strict=True):
        right = wanted(example)
        for *losses, _, _ in parts:
            for found, each in zip(losses, right, strict=False):
                torch.testing.assert_close(found, each, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(sum(each[3] for each in parts), right[3], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.cat([each[4] for each in parts]), right[4], rtol=1e-11, atol=1e-11)


def with_teacher(objective: Objective, change: Callable[[Tensor], Tensor]) -> Objective:
    """The same with other numbers of its teacher, if it has one."""
    teacher = objective.teacher
    if teacher and teacher.head is not None:
        teacher = dataclasses.replace(teacher, hidden=change(teacher.hidden), head=change(teacher.head))
    return dataclasses.replace(objective, teacher=teacher)


@pytest.mark.parametrize("taught", [None, 0.4])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_precisions(dtype: torch.dtype, error: float, backend: str | None, taught: float | None) -> None:
    """Losses are in fp32; in bf16 the logits are rounded, and gradients as often as there are chunks."""
    example = Example(6, tokens=64, hidden=32, vocabulary=300, labelled=1.0, taught=taught)
    if taught is not None:
        example = dataclasses.replace(example, soft_cap=20.0, temperature=2.0)
    hidden, head, objective = example.made()
    hidden, head = hidden.to(dtype) / 2, head.to(dtype) / 2
    objective = with_teacher(objective, lambda x: x.to(dtype) / 2)
    right_hidden, right_head = hidden.double().requires_grad_(), head.double().requires_grad_()
    right = literal(right_hidden, right_head, with_teacher(objective, Tensor.double))[0]
    right.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", 300 * 16)
        losses = linear_loss(hidden.requires_grad_(), head.requires_grad_(), objective, backend=backend)
    losses.total.backward()
    assert losses.total.dtype == losses.cross_entropy.dtype == torch.float32
    assert losses.total.item() == pytest.approx(right.item(), rel=error)
    pairs: list[tuple[Any, Any]] = [(hidden.grad, right_hidden.grad), (head.grad, right_head.grad)]
    for found, exact in pairs:
        assert found.dtype == dtype
        assert float((found.double() - exact).norm() / exact.norm()) < error


def test_without_gradients_there_are_none() -> None:
    hidden, head, objective = Example(7).made()
    with torch.no_grad():
        losses = linear_loss(hidden.requires_grad_(), head.requires_grad_(), objective)
    assert not losses.total.requires_grad
    torch.testing.assert_close(losses.total, literal(hidden, head, objective)[0].detach())


def test_chunks_are_equal_and_cover_every_token() -> None:
    found = chunks(4096, 151_936)
    assert len(found) == 10 and max(part.stop - part.start for part in found) == 410
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(4096))
    assert chunks(512, 4096) == [slice(0, 512)]
    assert chunks(3, 11, 1, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_chunks_of_a_few_tiles_are_whole_tiles() -> None:
    """1,767 tokens would fit."""
    assert [part.stop - part.start for part in chunks(8 * 4096, 151_936, 1, 2**28)] == [*[1536] * 21, 512]
    assert [part.stop - part.start for part in chunks(4096, 151_936, 1, 2**28)] == [1536, 1536, 1024]
    assert chunks(1000, 151_936, 1, 2**28) == [slice(0, 1000)]


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (4096, [1536, 1536, 1024]),
        (4 * 4096, [2048] * 8),
        (8 * 4096, [4096] * 8),
        (12 * 4096, [4096] * 12),
    ],
)
def test_many_tokens_have_few_chunks_where_they_are_compiled(tokens: int, sizes: list[int]) -> None:
    rows = 151_936
    assert 2 * compiled_elements(10**6, 2 * rows, 2) == MOST_CHUNK_BYTES
    found = chunks(tokens, rows, elements=compiled_elements(tokens, rows, 2))
    assert [part.stop - part.start for part in found] == sizes


@pytest.mark.parametrize(("bound", "code"), [(4.0, 0), (0.5, 1)])
def test_the_command(bound: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 x 3,000 logits, in bf16 and fp32: 1.1 MiB, and more with a teacher's; too few for chunks."""
    file = tmp_path / "loss.json"
    options = {"tokens": 64, "hidden": 8, "vocabulary": 3000, "precision": "bf16", "bound": bound, "json": file}
    assert command.run(argparse.Namespace(**options)) == code
    shown = capsys.readouterr().out
    assert "| in chunks, with a divergence" in shown and f"bound {bound:g} MiB" in shown
    assert json.loads(file.read_text())["mib"]["in chunks"]["gradients"] == pytest.approx(3064 * 16 / 2**20)


def test_the_memory_is_bounded_and_no_number_is_waited_for() -> None:
    """6,513 MiB with all logits at once; tensors without contents have no numbers to give."""
    taken = memory_of(in_chunks, Sizes(4096, 2048, 151_936, torch.bfloat16))
    assert taken.extra < 400 * 2**20
    with pytest.raises(Exception, match="_local_scalar_dense"):
        memory_of(lambda h, w, _: h.sum() * float(w.sum().item()), Sizes(4, 4, 4, torch.float32))
