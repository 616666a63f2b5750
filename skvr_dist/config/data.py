"""The `data:` section: where the tokens come from and how they are cut into sequences."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from skvr_dist.schedule import Positive, Schedule, jumps_of
from skvr_dist.section import Section


def _changes_in_jumps(weight: float | Schedule) -> float | Schedule:
    if isinstance(weight, Schedule):
        jumps_of(weight)
    return weight


class SourceConfig(Section):
    """One of several training sets."""

    path: str
    """Where the data set is, as for a single one."""
    weight: Annotated[Positive, AfterValidator(_changes_in_jumps)] = 1.0
    """Its share of the sequences, relative to the other sources: exact over the long run.

    A schedule of weights (0 or more) changes in jumps: `{points: [[0.8, 1.0], [0.8, 0.25]]}`.
    """


class DataConfig(Section):
    """Tokenised data sets, as `tools/prepare_data.py` writes them."""

    train: dict[str, SourceConfig]
    """The training data set (shards and manifest.json), or several with weights, each by a name of its own.

    A single path stands for one source called `train`. A path is a folder, a URL that webdataset can open, or a
    `pipe:` command in which `{file}` stands for the name of a file.
    """
    validation: str
    """The held-out data set, in the same forms."""
    tokenizer: str
    """The tokenizer of all of them: it travels with checkpoints and exports."""
    sequence_length: int = Field(gt=0, le=10**8)
    """Tokens that the model reads per sequence; each sequence on disk spans one more, the last label."""
    lanes: int = Field(default=16, gt=0, le=10**6)
    """Independent token streams that the sequences of a batch are dealt from, whatever the number of replicas.

    Must be a multiple of micro_batch_size x data-parallel replicas, and no larger than the number of shards.
    """
    documents: Literal["joined", "separate"] = "joined"
    """Whether attention and positions run on across the documents of a sequence, or begin anew with each.

    Where documents are separate, the end of one does not predict the beginning of the next.
    """
    damage: Literal["stop", "skip"] = "stop"
    """A damaged piece of a shard stops the run, or is left out: its tokens get no loss, and are counted and logged."""
    on_resume: Literal["same_data", "other_data"] = "same_data"
    """Whether a run may resume from a checkpoint with other data, or in another order, than it was trained on."""
    workers: int = Field(default=1, ge=0, le=1024)
    """Processes of each replica that read ahead (0: read when the step asks)."""
    prefetch: int = Field(default=4, gt=0, le=10_000)
    """Micro-batches that each of them reads ahead."""

    @field_validator("train", mode="before")
    @classmethod
    def _as_sources(cls, train: Any) -> Any:
        if train == {}:
            raise ValueError("must name a data set")
        return {"train": {"path": train}} if isinstance(train, str) else train
