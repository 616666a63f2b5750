"""The passes of a micro-batch through the decoder: usually one, several where it is distilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a pass is for."""

    PLAIN = "plain"
    """It predicts the labels alone."""
    TARGET = "target"
    """The passes after it, of the same micro-batch, are drawn to its distribution; it predicts the labels too."""
    STUDENT = "student"
    """It is drawn to the last target's distribution."""


@dataclass(frozen=True)
class Pass:
    """One pass of a micro-batch."""

    donors: tuple[int, ...] | None = None
    """The layer that each layer reads; None: as the routing plan has it."""
    role: Role = Role.PLAIN
    by_teacher: bool = False
    """Whether it is a frozen teacher's decoder that it passes through."""
    weight: float = 1.0
    """Of its loss in that of the micro-batch, in which the weights add up to 1; at 0 it only runs forwards."""
    divergence: float = 0.0
    """Share of the divergence from the target in its loss."""

    @property
    def runs_back(self) -> bool:
        """Whether it has a backward pass."""
        return self.weight > 0


StepPasses = Sequence[tuple[Pass, ...]]
"""The passes of each micro-batch of the global batch, in the order in which they run."""
ONCE = (Pass(),)
"""Those of a micro-batch that is not distilled."""
