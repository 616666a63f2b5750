"""The `data:` section: where the tokens come from and how they are cut into sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from skvr_dist.errors import UserError
from skvr_dist.schedule import Positive, Schedule, jumps_of
from skvr_dist.section import Section


def _changes_in_jumps(weight: float | Schedule) -> float | Schedule:
    if isinstance(weight, Schedule):
        jumps_of(weight)
    return weight


Format = Literal["shards", "examples", "squad", "hotpotqa", "ms_marco", "triviaqa", "repliqa", "chat"]
"""What a data set is: shards of documents, or a file of fine-tuning examples (docs/finetuning.md)."""


QUESTION_FORMATS: tuple[Format, ...] = ("examples", "squad", "hotpotqa", "ms_marco", "triviaqa", "repliqa")
"""Formats of questions about contexts."""
QUESTION_FIRST_PROB = 0.5


class HeldOutConfig(Section):
    """One of several data sets."""

    path: str
    """Where the data set is, as for a single one; for examples their file."""
    format: Format = "shards"
    """`shards` of documents (`tools/prepare_data.py`), or fine-tuning examples in a file as their authors publish it.

    `examples` is a jsonl file of context, question and answer, `chat` one of messages; docs/finetuning.md has the
    others.
    """
    question_first_prob: float = Field(default=QUESTION_FIRST_PROB, ge=0, le=1)
    """Probability that an example's question comes before its context instead of after it, drawn for each example.

    Of held-out data by default that of the training data of the same name.
    """

    @property
    def has_examples(self) -> bool:
        """Whether it is made of fine-tuning examples."""
        return self.format != "shards"


class SourceConfig(HeldOutConfig):
    """One of several training sets."""

    weight: Annotated[Positive, AfterValidator(_changes_in_jumps)] = 1.0
    """Its share of the sequences, relative to the other sources: exact over the long run.

    A schedule of weights (0 or more) changes in jumps: `{points: [[0.8, 1.0], [0.8, 0.25]]}`.
    """


class DataConfig(Section):
    """Tokenised data sets, as `tools/prepare_data.py` writes them, and files of fine-tuning examples."""

    train: dict[str, SourceConfig]
    """The training data set (shards and manifest.json), or several with weights, each by a name of its own.

    A single path stands for one source called `train`. A path is a folder, a URL that webdataset can open, or a
    `pipe:` command in which `{file}` stands for the name of a file.
    """
    validation: dict[str, HeldOutConfig]
    """The held-out data set, or several, which have equal parts of the held-out sequences; in the same forms."""
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

    Where documents are separate, the end of one does not predict the beginning of the next. Fine-tuning examples need
    them separate.
    """
    examples_cache: str | None = None
    """Folder that keeps the tokens of fine-tuning examples, for all ranks of a host and for later runs; null: each rank
    makes its own and holds them in memory."""
    damage: Literal["stop", "skip"] = "stop"
    """A damaged piece of a shard stops the run, or is left out: its tokens get no loss, and are counted and logged."""
    on_resume: Literal["same_data", "other_data"] = "same_data"
    """Whether a run may resume from a checkpoint with other data, or in another order, than it was trained on."""
    workers: int = Field(default=1, ge=0, le=1024)
    """Processes of each replica that read ahead (0: read when the step asks)."""
    prefetch: int = Field(default=4, gt=0, le=10_000)
    """Micro-batches that each of them reads ahead."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _as_sources(cls, sources: Any, info: ValidationInfo) -> Any:
        if sources == {}:
            raise ValueError("must name a data set")
        if isinstance(sources, str):
            return {str(info.field_name): {"path": sources}}
        if not isinstance(sources, dict):
            return sources
        as_trained = {name: source.question_first_prob for name, source in info.data.get("train", {}).items()}
        return {
            name: {"question_first_prob": as_trained[name], **source}
            if name in as_trained and isinstance(source, dict)
            else source
            for name, source in sources.items()
        }

    @model_validator(mode="after")
    def _examples_are_separate(self) -> DataConfig:
        named: dict[str, HeldOutConfig] = {f"train.{name}": source for name, source in self.train.items()}
        named |= {f"validation.{name}": source for name, source in self.validation.items()}
        for name, source in named.items():
            if source.has_examples and self.documents == "joined":
                raise ValueError(
                    f"{name} holds examples, each of which attends to itself alone, but documents is joined; set "
                    f"data.documents to separate"
                )
        return self


class _Trained(Protocol):
    """A training set, as configured or as a checkpoint tells."""

    @property
    def format(self) -> str: ...

    @property
    def question_first_prob(self) -> float: ...


def question_first_prob(trained: Mapping[str, _Trained], form: str, way_out: str) -> float:
    """How often a model that was trained on these sets expects a question before its context.

    A model that never saw a question first would be found not to know the answer.

    Args:
        form: of the questions; sets of this format count, or without any all sets of questions.
        way_out: what to do if they differ.

    Raises:
        UserError: they differ.
    """
    asked = {name: source for name, source in trained.items() if source.format in QUESTION_FORMATS}
    sources = {name: source for name, source in asked.items() if source.format == form} or asked
    found = {source.question_first_prob: name for name, source in sources.items()}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(f"training data {first} has question_first_prob {one:g}, but {second} has {other:g}; {way_out}")
    return next(iter(found), QUESTION_FIRST_PROB)
