"""What readers of a checkpoint ask of its config.yaml: typed, and tolerant of sections and keys that they do not read.

The config.yaml of a run is complete; that of an import has the model and routing sections only.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from skvr_dist.config.data import QUESTION_FIRST_PROB, HeldOutConfig
from skvr_dist.config.distillation import DistillationConfig
from skvr_dist.config.model import ModelConfig
from skvr_dist.routing import RoutingConfig
from skvr_dist.schedule import Positive


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())


class StoredSource(_Stored):
    """What is read of a training set."""

    format: str = "shards"
    question_first_prob: float = QUESTION_FIRST_PROB


class StoredData(_Stored):
    """What is read of the `data:` section; all None for an import."""

    train: dict[str, StoredSource] | None = None
    validation: dict[str, HeldOutConfig] | None = None
    """Where the held-out data sets were."""
    sequence_length: int | None = None
    documents: Literal["joined", "separate"] | None = None

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _as_sources(cls, found: Any, info: ValidationInfo) -> Any:
        return {str(info.field_name): {"path": found}} if isinstance(found, str) else found


class StoredTraining(_Stored):
    """What is read of the `train:` section; what every run has is None for an import."""

    steps: int | None = None
    seed: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: Positive | None = None
    weight_decay: float | None = None
    precision: Literal["fp32", "bf16"] | None = None
    min_learning_rate_ratio: float | None = None
    warmup_steps: int | None = None
    # Checkpoints from before these keys were trained as their defaults say.
    learning_rate_decay: Literal["cosine", "linear", "constant"] = "cosine"
    decay_steps: int | None = None
    learning_rate_from_step: int = 0
    schedule_steps: int | None = None
    only: list[str] | None = None


class StoredEvaluation(_Stored):
    """What is read of the `evaluate:` section."""

    profiles: dict[str, str] = {}
    """Named cache strategies."""


class StoredConfig(_Stored):
    """The configuration that a checkpoint was written with, whole or in part."""

    model: ModelConfig
    routing: RoutingConfig
    data: StoredData = StoredData()
    train: StoredTraining = StoredTraining()
    evaluate: StoredEvaluation = StoredEvaluation()
    distillation: DistillationConfig | None = None
