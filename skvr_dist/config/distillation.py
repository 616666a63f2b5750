"""The `distillation:` section: what routed passes learn from besides the labels."""

from __future__ import annotations

from pydantic import Field, model_validator

from skvr_dist.schedule import Share
from skvr_dist.section import Section

SELF = "self"
"""The teacher that is the model's own pass at full retention."""
ROUTED = "routed"
"""The pass with the donors that the routing policy draws."""


class DistillationConfig(Section):
    """A teacher for the model: its own pass at full retention, or another model that stays as it is (docs/losses.md).

    A distilled micro-batch passes through the teacher first, and then as `passes` says.
    """

    teacher: str = Field(min_length=1)
    """`self`: the model's own pass at full retention (in-place distillation); else a checkpoint or an imported model
    with the same tokenizer, which is held beside the model and read by no optimizer."""
    weight: Share = 0.5
    """Share of the divergence in the loss of a token of `passes`; the cross entropy with its label has the rest."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """What both models' logits are divided by; the divergence is multiplied by its square."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of a step's micro-batches that are distilled; the others pass once, routed, against their labels alone.

    Which ones moves on from step to step."""
    full_weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the cross entropy of the own pass at full retention, where each of `passes` has 1; 0 makes it a teacher
    only, without a backward pass. Without effect with another teacher."""
    passes: list[str] = Field(default=[ROUTED], min_length=1)
    """Passes that learn: `routed`, with the donors that were drawn, or cache strategies, such as every:4."""

    @property
    def is_own(self) -> bool:
        """Whether the model is its own teacher."""
        return self.teacher == SELF

    @model_validator(mode="after")
    def _possible(self) -> DistillationConfig:
        if len(set(self.passes)) < len(self.passes):
            raise ValueError(f"passes {self.passes} must name each pass once")
        if self.is_own and "full" in self.passes:
            raise ValueError("passes names full, which teacher self runs already; set full_weight, and leave it out")
        if self.is_own and self.weight == 0 and self.full_weight == 0:
            raise ValueError(
                "weight 0 and full_weight 0 leave nothing to learn from the pass at full retention; raise one of them"
            )
        return self
