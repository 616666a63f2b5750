"""The loss of hidden states under an output head, without all of their logits at once.

Logits are made for a chunk of tokens at a time, turned into their own gradient in place, and used up: for the gradient
of the hidden states and for that of the head, both in the forward pass. The backward pass multiplies these by one
number. So what is held besides the two gradients is a few tensors of `CHUNK_ELEMENTS` numbers, however many tokens
there are; compiled, the logits of `compiled_elements`, a teacher's among them.

On GPUs what is between the products of matrices is compiled into two passes over the logits as they come out of the
product, in 16 bits: one for the figures of each token, one that turns them into their gradient. Operation by operation
it would be a dozen passes in float32: 11 % of a step of Qwen3-1.7B on an H100.

The head's rows may be split over tensor-parallel ranks. Each takes the softmax over its own rows, and one small gather
per chunk makes those of all rows of it: no rank ever holds the logits of the whole vocabulary.

Why not `torch.nn.functional.linear_cross_entropy` with its chunked path (torch 2.13): it knows one rank, no divergence
from a teacher, no soft-cap and no z-loss, does not give the losses of single tokens beside their sum's gradient, and
torch 2.11 does not have it. What it is good at, memory, this is too (`tools/bench.py loss`), so there is one path.

Shapes: N tokens, D hidden, R rows of the head that this rank holds, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""A label that is not to be predicted (PyTorch's own mark)."""
CHUNK_ELEMENTS = 2**26
"""Logits that are held at once, in float32: 256 MiB."""
COMPILED_CHUNK_BYTES = 2**29
"""Of logits where a compiler fuses what is done with them, if tokens are not many (`compiled_elements`)."""
MOST_CHUNK_BYTES = 5 * 2**28
"""Of them if tokens are many: 4,096 tokens of Qwen3's vocabulary in bf16 are 1.16 GiB."""
TILE = 256
"""Tokens that a GPU's product of matrices takes at once; chunks of a few tiles are whole ones."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A distribution that the model's is drawn to."""

    hidden: Tensor
    """[B, S, D'], what the teacher's head sees of the same tokens."""
    head: Tensor | None = None
    """This rank's rows of the teacher's head, [R, D']; None: the model's own head."""
    weight: float = 1.0
    """Share of the divergence in a token's loss; the cross entropy has the rest."""
    temperature: float = 1.0
    """What both models' logits are divided by; the divergence is multiplied by its square (arXiv 1503.02531)."""
    soft_cap: float | None = None
    """The teacher's own."""


@dataclass(frozen=True, eq=False)
class Objective:
    """What is to be predicted, and what the loss of a token is made of.

    (1 - teacher.weight) * cross entropy + teacher.weight * temperature^2 * KL(teacher || model) + z_loss * log(Z)^2,
    with Z the sum of the exponentials of the token's logits (arXiv 2204.02311, section 5).
    """

    labels: Tensor
    """int [B, S]; tokens with an `IGNORED` one have no loss."""
    weights: Tensor | None = None
    """float [B, S], what each token's loss is multiplied by in the sum; None: 1."""
    teacher: Teacher | None = None
    z_loss: float = 0.0
    soft_cap: float | None = None
    """Logits become soft_cap * tanh(logits / soft_cap) (arXiv 2408.00118)."""


class Losses(NamedTuple):
    """Losses in nats, in float32 (in float64 if the hidden states are)."""

    total: Tensor
    """[], the weighted sum over tokens; the only one with a gradient."""
    cross_entropy: Tensor
    """[B, S], of each token, unweighted; 0 where the label is `IGNORED`."""
    divergence: Tensor
    """[B, S], KL(teacher || model) of each token in the same way; all 0 without a teacher."""


@dataclass(frozen=True)
class Rows:
    """The rows of a head that this rank holds: those of the tokens in `held`; others may follow as padding."""

    held: range
    group: dist.ProcessGroup | None = None
    """The ranks that hold the other rows; None if there are none."""

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each label among those held here, 0 for the others; and, as bool, which the others are."""
        local = labels - self.held.start
        elsewhere = (local < 0) | (local >= len(self.held))
        return local.masked_fill(elsewhere, 0), elsewhere

    def gather(self, figures: list[Tensor]) -> Tensor:
        """Some figures [N] of every rank, [ranks, figures, N]; collective."""
        mine = torch.stack(figures)
        if self.group is None:
            return mine[None]
        ranks = self.group.size()
        everyone = mine.new_empty((ranks * mine.shape[0], mine.shape[1]))
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        return everyone.view(ranks, *mine.shape)


def linear_loss(
    hidden: Tensor, head: Tensor, objective: Objective, rows: Rows | None = None, backend: str | None = None
) -> Losses:
    """The losses of hidden states [B, S, D] under a head [R, D]; collective over the ranks that share it.

    With gradients enabled, those that are needed are made here, in the precision of `hidden` and `head`; chunks of the
    head's gradient are added up in its own precision. Each rank's gradient of the hidden states is the part that comes
    from its rows. One backward pass can follow.

    Args:
        rows: which rows of the vocabulary the head's are; None: all of them.
        backend: of torch.compile, for what is between the products of matrices; None: run operation by operation.
    """
    rows = rows or Rows(range(head.shape[0]))
    needed = torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and head.requires_grad
    total, cross_entropy, divergence = _LinearLoss.apply(hidden, head, objective, rows, needed, backend)
    return Losses(total, cross_entropy, divergence)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        objective: Objective,
        rows: Rows,
        needed: tuple[bool, bool],
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat, own_rows = hidden.flatten(0, -2), head[: len(rows.held)]
        d_hidden = torch.empty_like(flat) if needed[0] else None
        d_head = torch.empty_like(head) if needed[1] else None
        found = []
        tensors, elements = _held_at_once(objective), CHUNK_ELEMENTS
        if backend == "inductor":
            tensors = 1 + (objective.teacher is not None)
            elements = compiled_elements(flat.shape[0], head.shape[0], head.element_size())
        # Of the head's rows, not of those that are held: every rank must make the same chunks.
        for chunk in chunks(flat.shape[0], head.shape[0], tensors, elements):
            if backend:
                logits, *losses = _of_chunk_compiled(flat, own_rows, objective, rows, chunk, any(needed), backend)
            else:
                logits, *losses = _of_chunk(flat, own_rows, objective, rows, chunk, with_gradients=any(needed))
            found.append(losses)
            if any(needed):
                logits = logits.to(head.dtype)
            if d_hidden is not None:
                torch.mm(logits, own_rows, out=d_hidden[chunk])
            if d_head is not None and chunk.start == 0:
                torch.mm(logits.t(), flat[chunk], out=d_head[: len(rows.held)])
                d_head[len(rows.held) :].zero_()
            elif d_head is not None:
                d_head[: len(rows.held)].addmm_(logits.t(), flat[chunk])
            del logits  # before those of the next chunk are made
        total, cross_entropy, divergence = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.gradients = d_hidden, d_head
        shape = hidden.shape[:-1]
        cross_entropy, divergence = cross_entropy.view(shape), divergence.view(shape)
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return total.sum(), cross_entropy, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of this loss are used up: run its backward pass once"
        d_hidden, d_head = (None if each is None else each.mul_(grads[0]) for each in ctx.gradients)
        ctx.gradients = None
        d_hidden = None if d_hidden is None else d_hidden.view(*grads[1].shape, -1)
        return d_hidden, d_head, None, None, None, None


def _held_at_once(objective: Objective) -> int:
    """Tensors as large as a chunk's logits, operation by operation."""
    return 1 + 2 * (objective.teacher is not None) + (objective.soft_cap is not None)


def compiled_elements(tokens: int, rows: int, element_size: int) -> int:
    """Logits that are held at once, a teacher's among them, where a compiler fuses what is done with them.

    The head's gradient is read and written once for each chunk, so that fewer of them cost less: where tokens are many,
    eight, of at most 4,096. With hidden states of 2,048 and tiles of 128 x 256 these have 256 tiles, two rounds of the
    132 multiprocessors of an H100; 1,536 tokens, which fit into 512 MiB, have 96.
    """
    most = min(min(tokens // 8, 4096) * rows, MOST_CHUNK_BYTES // element_size)
    return max(COMPILED_CHUNK_BYTES // element_size, most)


def chunks(tokens: int, rows: int, tensors: int = 1, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Parts of the tokens whose logits fit into that many elements, with all tensors of their size.

    All but the last are equal; where two tiles or more fit, they are whole tiles.
    """
    most = max(elements // (rows * tensors), 1)
    tile = TILE if most >= 2 * TILE else 1
    count = -(-tokens // (most // tile * tile))
    size = -(-tokens // (max(count, 1) * tile)) * tile
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _of_chunk(
    hidden: Tensor, head: Tensor, objective: Objective, rows: Rows, chunk: slice, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the sum of losses in the logits [n, R]; each token's weighted loss, entropy and divergence."""
    labels, teacher = objective.labels.flatten()[chunk], objective.teacher
    logits, slope = _capped_in_place(hidden[chunk] @ head.t(), objective.soft_cap, with_gradients)
    ignored, weight = _weights(objective, chunk, logits.dtype)
    local, elsewhere = rows.local(labels)
    label_logit = logits.gather(-1, local[:, None]).squeeze(-1).masked_fill(elsewhere, 0.0)
    taught = _divergence(logits, head, teacher, chunk) if teacher else None
    own = _exponentials(logits)
    figures = rows.gather([own.log_sum, label_logit, *(taught.figures if taught else ())])
    log_z, label_logit = figures[:, 0].logsumexp(0), figures[:, 1].sum(0)
    cross_entropy = (log_z - label_logit).masked_fill(ignored, 0.0)
    divergence = torch.zeros_like(cross_entropy)
    share = 0.0
    if teacher and taught:
        share = teacher.weight
        divergence = taught.over_all_rows(*figures[:, 2:].unbind(1)).masked_fill(ignored, 0.0)
    loss = (1 - share) * cross_entropy + objective.z_loss * log_z.square()
    if teacher:
        loss += share * teacher.temperature**2 * divergence
    if with_gradients:
        # Each pass over the logits counts: what multiplies a token's row is multiplied first.
        factor = (own.highest - log_z).exp() * (1 - share + 2 * objective.z_loss * log_z)
        at_label = (elsewhere.to(logits.dtype) - 1) * (1 - share)
        logits.mul_((factor * weight)[:, None])
        logits.scatter_add_(-1, local[:, None], (at_label * weight)[:, None])
        if taught:
            taught.add_gradient(logits, share * weight)
        if slope is not None:
            logits.mul_(slope)
    return logits, loss * weight, cross_entropy, divergence


def _weights(objective: Objective, chunk: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which tokens are ignored, bool [n], and what each token's loss counts [n]."""
    ignored = objective.labels.flatten()[chunk] == IGNORED
    weight = (~ignored).to(dtype)
    if objective.weights is not None:
        weight = weight * objective.weights.flatten()[chunk].to(dtype)
    return ignored, weight


def _of_chunk_compiled(
    hidden: Tensor,
    head: Tensor,
    objective: Objective,
    rows: Rows,
    chunk: slice,
    with_gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_of_chunk`; logits stay in the precision of the product, and so does their gradient."""
    figures_of, write_gradient = _compiled(backend)
    labels, teacher = objective.labels.flatten()[chunk], objective.teacher
    logits, taught = hidden[chunk] @ head.t(), None
    if teacher:
        taught = _taught(head, teacher, chunk), teacher.soft_cap, teacher.temperature
    local, elsewhere = rows.local(labels)
    log_sum, label_logit, *of_teacher = figures_of(logits, local, objective.soft_cap, taught)
    figures = rows.gather([log_sum, label_logit.masked_fill(elsewhere, 0.0), *of_teacher])
    log_z, label_logit = figures[:, 0].logsumexp(0), figures[:, 1].sum(0)
    ignored, weight = _weights(objective, chunk, log_z.dtype)
    cross_entropy = (log_z - label_logit).masked_fill(ignored, 0.0)
    divergence, drawn, share = torch.zeros_like(cross_entropy), None, 0.0
    if teacher:
        share = teacher.weight
        divergence, log_teacher, log_student = _over_all_rows(*figures[:, 2:].unbind(1))
        divergence = divergence.masked_fill(ignored, 0.0)
        drawn = log_teacher, log_student, share * teacher.temperature * weight
    loss = (1 - share) * cross_entropy + objective.z_loss * log_z.square()
    if teacher:
        loss += share * teacher.temperature**2 * divergence
    if with_gradients:
        factor = weight * (1 - share + 2 * objective.z_loss * log_z)
        at_label = (weight * (1 - share)).masked_fill(elsewhere, 0.0)
        write_gradient(logits, local, log_z, factor, at_label, objective.soft_cap, taught, drawn)
    return logits, loss * weight, cross_entropy, divergence


_Taught = tuple[Tensor, float | None, float]
"""A teacher's logits [n, R], its soft-cap and the temperature."""


@functools.cache
def _compiled(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two passes over a chunk's logits."""
    compile_ = functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    return compile_(_figures), compile_(_write_gradient)


def _figures(logits: Tensor, local: Tensor, soft_cap: float | None, taught: _Taught | None) -> list[Tensor]:
    """The logarithm of the sum of exponentials of each token's logits [n, R], and its label's logit; [n], float32.

    With a teacher also the logarithm of its sum of exponentials, the teacher's mean of what its logits are above the
    student's, and the student's logarithm, all at the temperature.
    """
    capped = _capped(logits, soft_cap)
    found = [capped.logsumexp(-1), capped.gather(-1, local[:, None]).squeeze(-1)]
    if taught:
        theirs, own = _capped(taught[0], taught[1]) / taught[2], capped / taught[2]
        log_sum = theirs.logsumexp(-1)
        mean_difference = ((theirs - log_sum[:, None]).exp() * (theirs - own)).sum(-1)
        found += [log_sum, mean_difference, own.logsumexp(-1)]
    return found


def _write_gradient(
    logits: Tensor,
    local: Tensor,
    log_z: Tensor,
    factor: Tensor,
    at_label: Tensor,
    soft_cap: float | None,
    taught: _Taught | None,
    drawn: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Turn logits [n, R] into factor * softmax - at_label at the label, times the slope of the soft-cap; in place.

    With a teacher `drawn` has its logarithm of the sum of exponentials, the student's, and what the difference of both
    distributions is multiplied by before it is added.
    """
    capped = _capped(logits, soft_cap)
    gradient = (capped - log_z[:, None]).exp() * factor[:, None]
    is_label = torch.arange(logits.shape[-1], device=logits.device) == local[:, None]
    gradient = torch.where(is_label, gradient - at_label[:, None], gradient)
    if taught and drawn:
        log_teacher, log_student, strength = drawn
        theirs, own = _capped(taught[0], taught[1]) / taught[2], capped / taught[2]
        difference = (own - log_student[:, None]).exp() - (theirs - log_teacher[:, None]).exp()
        gradient = gradient + strength[:, None] * difference
    if soft_cap is not None:
        gradient = gradient * (1.0 - (capped / soft_cap).square())
    logits.copy_(gradient)


def _capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Logits in float32 (float64 if they are), within the soft-cap."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()


def _capped_in_place(logits: Tensor, soft_cap: float | None, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Logits [n, R] in float32 (float64 if they are), and the slope of the soft-cap at each, if there is one."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if soft_cap is None:
        return logits, None
    logits.div_(soft_cap).tanh_()
    slope = logits.square().neg_().add_(1.0) if with_slope else None
    return logits.mul_(soft_cap), slope


def _divergence(logits: Tensor, head: Tensor, teacher: Teacher, chunk: slice) -> _Divergence:
    taught, _ = _capped_in_place(_taught(head, teacher, chunk), teacher.soft_cap, with_slope=False)
    return _Divergence(logits, taught, teacher.temperature)


def _taught(head: Tensor, teacher: Teacher, chunk: slice) -> Tensor:
    """The teacher's logits [n, R], as the product has them."""
    rows = head if teacher.head is None else teacher.head[: head.shape[0]]
    return teacher.hidden.flatten(0, -2)[chunk] @ rows.t()


def _over_all_rows(of_teacher: Tensor, mean_difference: Tensor, of_student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) [n] from the figures of every rank's rows, each [ranks, n]; and both logarithms of the sum
    of exponentials [n], of the teacher and of the student."""
    log_teacher, log_student = of_teacher.logsumexp(0), of_student.logsumexp(0)
    own_part = (mean_difference * (of_teacher - log_teacher).exp()).sum(0)
    return own_part - log_teacher + log_student, log_teacher, log_student


class _Exponentials(NamedTuple):
    """What rows of logits were, that are exponentials of their distance from the highest now."""

    highest: Tensor
    """[n]"""
    sum: Tensor
    """[n], of the exponentials."""

    @property
    def log_sum(self) -> Tensor:
        """[n], the logarithm of the sum of exponentials of the logits."""
        return self.highest + self.sum.log()


def _exponentials(logits: Tensor) -> _Exponentials:
    """Turn logits [n, R] into the exponentials of their distance from the highest of each token, in place."""
    highest = logits.amax(-1, keepdim=True)
    total = logits.sub_(highest).exp_().sum(-1)
    return _Exponentials(highest.squeeze(-1), total)


class _Divergence:
    """A chunk's divergence from a teacher: over this rank's rows alone, until `over_all_rows` has seen everyone's."""

    def __init__(self, logits: Tensor, taught: Tensor, temperature: float) -> None:
        """Of the student's and the teacher's logits [n, R]; the latter are used up."""
        self._temperature = temperature
        difference = taught.div_(temperature)
        self._teacher = difference.clone()
        self._of_teacher = _exponentials(self._teacher)
        difference.sub_(logits, alpha=1 / temperature)
        mean_difference = difference.mul_(self._teacher).sum(-1) / self._of_teacher.sum
        self._student = torch.div(logits, temperature, out=difference)
        self._of_student = _exponentials(self._student)
        self.figures = [self._of_teacher.log_sum, mean_difference, self._of_student.log_sum]

    def over_all_rows(self, of_teacher: Tensor, mean_difference: Tensor, of_student: Tensor) -> Tensor:
        """KL(teacher || student) [n] at the temperature, from the `figures` of every rank, each [ranks, n]."""
        divergence, log_teacher, log_student = _over_all_rows(of_teacher, mean_difference, of_student)
        self._teacher.mul_((self._of_teacher.highest - log_teacher).exp()[:, None])
        self._student.mul_((self._of_student.highest - log_student).exp()[:, None])
        return divergence

    def add_gradient(self, gradient: Tensor, share: Tensor) -> None:
        """Add that of share [n] * temperature^2 * the divergence in the student's logits."""
        gradient.addcmul_(self._student.sub_(self._teacher), (share * self._temperature)[:, None])
