"""What checkpoint.json says of a checkpoint besides its tensors and its configuration."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

FORMAT = 3
"""Version of the layout of files, which this release writes."""
OLDEST_FORMAT = 2
"""The first version that is read, too: its index does not say how many bytes share a digest."""


class _Record(BaseModel):
    """Base of the records: typed and frozen; keys that only other versions know are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class GuardFacts(_Record):
    """The state from which `skvr_dist.parallel.guard.UpdateGuard` continues."""

    losses: list[float]
    """The last finite losses, the newest last."""
    skipped_steps: int
    skipped_in_a_row: int


class LayoutFacts(_Record):
    """Layout of the run that wrote the checkpoint, for the record; any other layout can resume from it."""

    pipeline: list[int]
    """Layers of each stage."""
    tensor: int
    replicas: int
    zero_stage: int
    precision: str


class AverageFacts(_Record):
    """Which checkpoints of a run the weights are an average of, the oldest first."""

    steps: list[int]
    shares: list[float]
    """What each of them counts for; they add up to 1."""


class Facts(_Record):
    """Everything in checkpoint.json. A field that does not apply is None, and is not written.

    An import has neither data nor an optimizer's state.
    """

    format: int = FORMAT
    data_fingerprint: dict[str, Any] | None = None
    """Fingerprint of everything that decides which sequences the steps read (`SequenceStream.fingerprint`)."""
    evaluation_due: bool | None = None
    """Whether the evaluation of this step was put off, because the run was preempted."""
    step: int
    """Optimizer steps done."""
    adam_steps: int | None = None
    """Steps that the moments have seen; fewer if updates were skipped."""
    guard: GuardFacts | None = None
    tokens_seen: int
    imported_from: str | None = None
    """Source of the imported weights that training started from, directly or through earlier runs."""
    dequantized_from: str | None = None
    """Quantization types of that source's file, from which the weights were dequantized."""
    special_ids: dict[str, Any] | None = None
    """Ids of special tokens that the imported config.json names, while the data has the import's tokenizer."""
    averaged: AverageFacts | None = None
    """Of weights that are an average; `step` and all else are the newest one's."""
    layout: LayoutFacts | None = None
    routing: dict[str, Any] | None = None
    versions: dict[str, str] | None = None

    def record(self) -> dict[str, Any]:
        """The fields that apply, as plain values."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def to_json(self) -> str:
        """The text of checkpoint.json; what is written now has this release's format."""
        return json.dumps({**self.record(), "format": FORMAT}, indent=2) + "\n"

    def origin(self) -> dict[str, str]:
        """The fields that say where the weights come from; a run copies them from the checkpoint it starts from."""
        origin = {"imported_from": self.imported_from, "dequantized_from": self.dequantized_from}
        return {name: value for name, value in origin.items() if value is not None}
