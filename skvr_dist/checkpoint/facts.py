"""What checkpoint.json says of a checkpoint besides its tensors and its configuration."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

FORMAT = 2
"""Version of the layout of files; another one is refused."""


class _Record(BaseModel):
    """Typed and frozen; keys that other versions write are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class GuardFacts(_Record):
    """What `skvr_dist.parallel.guard.UpdateGuard` continues with."""

    losses: list[float]
    """The last finite ones, the newest last."""
    skipped_steps: int
    skipped_in_a_row: int


class LayoutFacts(_Record):
    """How the run that wrote it was laid out, for the record; any other layout can resume it."""

    pipeline: list[int]
    """Layers of each stage."""
    tensor: int
    replicas: int
    zero_stage: int
    precision: str


class Facts(_Record):
    """The record; None where it does not apply, and then not written.

    An import has neither data nor an optimizer's state.
    """

    format: int = FORMAT
    data_fingerprint: dict[str, Any] | None = None
    """Of all that decides which sequences the steps read (`SequenceStream.fingerprint`)."""
    evaluation_due: bool | None = None
    """Whether the evaluation of this step was put off, because the run was preempted."""
    step: int
    """Optimizer steps done."""
    adam_steps: int | None = None
    """Steps that the moments have seen; fewer if updates were skipped."""
    guard: GuardFacts | None = None
    tokens_seen: int
    imported_from: str | None = None
    """Where the weights, or those it was trained on from, come from."""
    dequantized_from: str | None = None
    """The kinds of blocks that their file held."""
    layout: LayoutFacts | None = None
    routing: dict[str, Any] | None = None
    versions: dict[str, str] | None = None

    def record(self) -> dict[str, Any]:
        """As plain values, those that apply."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def to_json(self) -> str:
        """The text of checkpoint.json."""
        return json.dumps(self.record(), indent=2) + "\n"

    def origin(self) -> dict[str, str]:
        """Where the weights come from, which a run hands on from those it starts with."""
        origin = {"imported_from": self.imported_from, "dequantized_from": self.dequantized_from}
        return {name: value for name, value in origin.items() if value is not None}
