"""Memory that the loss takes, with tensors that have shapes but no contents, so that any size fits here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from skvr_dist.lab.virtual.memory import LiveMemory
from skvr_dist.model.loss import Objective, Teacher, linear_loss

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """N tokens, D hidden, V vocabulary (of one rank), and the precision."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Taken:
    """The most bytes alive during one forward and backward pass of the loss, beside hidden states and head."""

    peak: int
    gradients: int
    """Of hidden states and head: what every way has in the end."""

    @property
    def extra(self) -> int:
        """Without the two gradients."""
        return self.peak - self.gradients


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A scalar of hidden states [1, N, D], head [V, D] and labels [1, N]."""


def all_logits(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, in float32, and torch's cross entropy."""
    logits = F.linear(hidden, head).float().flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="none").sum()


def in_chunks(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """What training uses."""
    return linear_loss(hidden, head, Objective(labels)).total


def in_chunks_with_a_teacher(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """The same, with a divergence from the model's own hidden states of another pass, at a temperature."""
    teacher = Teacher(hidden.detach(), weight=0.5, temperature=2.0)
    return linear_loss(hidden, head, Objective(labels, teacher=teacher)).total


def memory_of(loss: Loss, sizes: Sizes) -> Taken:
    """What one forward and backward pass takes. No number is computed, and none may be asked for.

    Raises:
        RuntimeError: the loss waits for a number of a tensor, as `.item()` does.
    """
    with FakeTensorMode(), LiveMemory() as memory:
        hidden = torch.empty(1, sizes.tokens, sizes.hidden, dtype=sizes.dtype, requires_grad=True)
        head = torch.empty(sizes.vocabulary, sizes.hidden, dtype=sizes.dtype, requires_grad=True)
        labels = torch.zeros(1, sizes.tokens, dtype=torch.long)
        before = memory.held
        memory.reset_peak()
        loss(hidden, head, labels).backward()
        return Taken(memory.peak - before, hidden.nbytes + head.nbytes)
