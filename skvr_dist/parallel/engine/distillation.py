"""What the passes of a micro-batch learn from each other: the target between them, and the parts of their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skvr_dist.model.loss import IGNORED, Losses, Objective, Teacher
from skvr_dist.parallel.engine.teacher import FrozenTeacher
from skvr_dist.parallel.pipeline.passes import ONCE, Pass, Role, StepPasses

PARTS = ("full", "routed", "divergence")
"""The cross entropy of targets that are trained and of students, and the students' divergence from their target."""


@dataclass
class Distillation:
    """Of one engine. Without `passes` every micro-batch has one, and learns from its labels alone."""

    passes: Callable[[int], StepPasses] | None = None
    """Those of each micro-batch of a step, counted from 0."""
    temperature: float = 1.0
    teacher: FrozenTeacher | None = None
    """None: the model is its own."""
    _target: Teacher | None = None  # of the micro-batch that runs, on the last stage
    _parts: dict[str, list[Tensor]] = field(default_factory=dict)  # of the passes of a step here, each [sum, labels]

    def of_step(self, step: int, micro_batches: int) -> StepPasses:
        """The passes of each micro-batch of the global batch."""
        return self.passes(step) if self.passes else [ONCE] * micro_batches

    def forget(self) -> None:
        """Drop what is kept of the passes that have run."""
        self._target, self._parts = None, {}

    def run_teacher(self, *inputs: object) -> object:
        """A pass of the frozen teacher, with the arguments and the result of `FrozenTeacher.run`."""
        assert self.teacher is not None
        outputs = self.teacher.run(*inputs)  # type: ignore[arg-type]
        if isinstance(outputs, Tensor):
            self._target = Teacher(outputs, self.teacher.head)
        return outputs

    def objective(self, run: Pass, labels: Tensor) -> Objective:
        """What a pass is to predict."""
        if run.role is not Role.STUDENT or not run.divergence:
            return Objective(labels)
        assert self._target is not None, "a target comes before its students"
        target = Teacher(self._target.hidden, self._target.head, run.divergence, self.temperature)
        return Objective(labels, teacher=target)

    def take(self, run: Pass, final: Tensor, losses: Losses | None, labels: Tensor) -> None:
        """Keep what a pass has made: the target of later ones, and the parts of its loss.

        Args:
            final: [B, S, D], what the head saw, without a gradient.
            losses: None if it had none.
        """
        if run.role is Role.PLAIN:
            return
        if run.role is Role.TARGET:
            self._target = Teacher(final)
        if losses is None:
            return
        parts = {"full" if run.role is Role.TARGET else "routed": losses.cross_entropy}
        if run.divergence:
            parts["divergence"] = losses.divergence
        count = (labels != IGNORED).sum()
        for name, each in parts.items():
            self._parts.setdefault(name, []).append(torch.stack([each.sum(), count]))

    def sums(self) -> list[Tensor]:
        """Sum and labels [2] of each part on this rank, where they were computed; nothing where no step distils."""
        if self.passes is None:
            return []
        found = (self._parts.get(name, []) for name in PARTS)
        return [sum(parts[1:], parts[0]) if parts else torch.zeros(2) for parts in found]

    @staticmethod
    def means(sums: Sequence[float]) -> dict[str, float]:
        """The mean of each part that there was, from `sums` added up over the ranks."""
        parts = zip(PARTS, sums[0::2], sums[1::2], strict=False)  # there are none where no step distils
        return {name: total / count for name, total, count in parts if count}
