"""The `train:`, `checkpoint:` and `evaluate:` sections: what a run does, what it keeps, how it is measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from skvr_dist.schedule import Positive, Schedule
from skvr_dist.section import Section


class TrainConfig(Section):
    """Optimisation: AdamW, its learning rate (a linear warm-up, then level or falling), and the run's schedules."""

    output_dir: str
    """Folder that holds everything of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything that is drawn: initial weights, donors, the order of the data."""
    steps: int = Field(gt=0, le=10**9)
    """Optimizer steps."""
    global_batch_size: int = Field(gt=0, le=10**7)
    """Sequences per optimizer step, over all replicas and micro-batches."""
    micro_batch_size: int = Field(gt=0, le=10**6)
    """Sequences per forward pass; each micro-batch draws its own donors."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; bf16 keeps fp32 master weights and reduces gradients in fp32."""
    learning_rate: Positive
    """Peak learning rate, reached after the warm-up; or a schedule, which a `constant` decay leaves as it is."""
    learning_rate_decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls from its peak; `constant` leaves it there."""
    decay_steps: int | None = Field(default=None, ge=2, le=10**9)
    """Last steps in which it falls, level before them (warm-up, stable, decay); null: all steps after the warm-up.

    The first of them is still at the peak, so that a run which branches off a level one there goes on without a jump.
    """
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the decay as a share of the peak."""
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    """Steps in which the learning rate rises to its peak, in equal parts."""
    learning_rate_from_step: int = Field(default=0, ge=0, le=10**9)
    """Steps done before the warm-up begins: more than 0 begins anew with the learning rate where a run is resumed."""
    schedule_steps: int | None = Field(default=None, gt=0, le=10**9)
    """Steps that schedules are spread over: the learning rate's, and those over shares of the run. null: train.steps.

    After them every schedule stays at its last value.
    """
    on_resume: Literal["same_schedule", "other_schedule"] = "same_schedule"
    """Whether a run may resume from a checkpoint with schedules that go on elsewhere than where they were.

    The peak learning rate may change in any case.
    """
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moments."""
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of AdamW's second moments."""
    adam_eps: float = Field(default=1e-8, gt=0, le=10**6)
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0, le=10**6)
    """Decay of the matrices; norms and biases are not decayed."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    max_loss_ratio: float | None = Field(default=None, gt=1)
    """Skip the update of a step whose loss exceeds this multiple of the median of the last 32; null allows any."""
    max_skipped_steps_in_a_row: int = Field(default=3, gt=0, le=10**9)
    """Consecutive skipped updates that end the run. A loss or gradient that is not finite always skips the update."""
    log_every_steps: int = Field(default=1, gt=0, le=10**9)
    """Steps between console lines; the writers of `metrics.writers` get every step."""
    only: list[str] | None = Field(default=None, min_length=1)
    """Modules whose parameters are trained, such as k_proj, mlp or lm_head; the others stay as they are. null: all."""
    watch_ranks_every_steps: int = Field(default=100, gt=0, le=10**9)
    """Steps between two comparisons of all ranks and links, which name those that make the others wait."""
    resume: str = Field(default="auto", min_length=1)
    """`auto` resumes from the run's newest whole checkpoint if it has one, `never` starts afresh; else a checkpoint.

    A command that names a checkpoint and is started again resumes from what it has saved since."""
    initial_weights: str | None = Field(default=None, min_length=1)
    """A checkpoint (or an imported model) whose weights a new run starts from; null draws them."""

    @property
    def horizon(self) -> int:
        """Steps that schedules are spread over."""
        return self.schedule_steps or self.steps

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        limit = f"train.{'schedule_steps' if self.schedule_steps else 'steps'} {self.horizon}"
        begin, warmup, decay = self.learning_rate_from_step, self.warmup_steps, self.decay_steps
        if warmup > self.horizon:
            raise ValueError(f"warmup_steps {warmup} exceeds {limit}")
        if begin and begin + warmup >= self.horizon:
            raise ValueError(
                f"learning_rate_from_step {begin} and warmup_steps {warmup} leave none of {limit}; lower one of them"
            )
        if isinstance(self.learning_rate, Schedule) and self.learning_rate_decay != "constant":
            raise ValueError(
                f"learning_rate is a schedule, which learning_rate_decay {self.learning_rate_decay} would bend; set "
                f"learning_rate_decay to constant"
            )
        if decay and self.learning_rate_decay == "constant":
            raise ValueError(
                f"decay_steps is {decay}, but learning_rate_decay is constant; set it to linear or cosine, or "
                f"decay_steps to null"
            )
        if decay and begin + warmup + decay > self.horizon:
            raise ValueError(
                f"decay_steps {decay} after warmup_steps {warmup} from step {begin} on exceeds {limit}; the most is "
                f"{self.horizon - begin - warmup}"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept; the last step always is written."""

    every_steps: int = Field(default=1000, gt=0, le=10**9)
    """Steps between two checkpoints."""
    keep_last: int = Field(default=3, gt=0, le=10**9)
    """Newest checkpoints to keep; with more than one, a damaged one does not end a run."""
    keep_every_steps: int | None = Field(default=None, gt=0, le=10**9)
    """Keep those of every n-th step as well; null keeps none."""
    megabytes_per_second: float | None = Field(default=100.0, ge=0.001)
    """Speed of each rank's writing beside training, so that a save is spread over steps; once somebody waits for it, it
    is written at full speed. null always writes at full speed."""


class EvaluateConfig(Section):
    """Evaluation at several retentions during training."""

    every_steps: int = Field(default=500, gt=0, le=10**9)
    """Steps between two evaluations; the last step is always evaluated."""
    strategies: list[str] = Field(default=["full", "every:2", "every:4"], min_length=1)
    """Cache strategies: full, every:G, prefix:M, a list such as 0,4,8, or a name from `profiles`."""
    profiles: dict[str, str] = Field(default={})
    """Named strategies."""
    sequences: int = Field(default=64, gt=0, le=10**7)
    """Held-out sequences; rounded up to whole micro-batches over all replicas."""
