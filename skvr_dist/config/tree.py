"""The configuration tree of a run: one typed source, from which everything else is derived.

`skvr_dist.config.load` reads it from files. Everything that can be checked without a process group is checked
here.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from skvr_dist.config.data import DataConfig
from skvr_dist.config.layouts import require_possible
from skvr_dist.config.model import ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy, RoutingConfig, RoutingPlan, draw_plan
from skvr_dist.section import Section


class TrainConfig(Section):
    """Optimisation: AdamW, linear warm-up, cosine decay."""

    output_dir: str
    """Folder that holds everything of the run."""
    seed: int = Field(default=0, ge=0)
    steps: int = Field(gt=0)
    """Optimizer steps."""
    global_batch_size: int = Field(gt=0)
    """Sequences per optimizer step, over all replicas and micro-batches."""
    micro_batch_size: int = Field(gt=0)
    """Sequences per forward pass; each micro-batch draws its own donors."""
    precision: Literal["fp32", "bf16"] = "bf16"
    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decay of the matrices; norms and biases are not decayed."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    max_loss_ratio: float | None = Field(default=None, gt=1)
    """Skip the update of a step whose loss exceeds this multiple of the median of the last 32; null applies it."""
    max_skipped_steps_in_a_row: int = Field(default=3, gt=0)
    """Skipped updates after which the run ends; those with a loss or gradient that is not finite always are."""
    log_every_steps: int = Field(default=1, gt=0)
    """Steps between console lines; TensorBoard and metrics.jsonl get every step."""
    resume: str = "auto"
    """`auto` goes on from the run's newest whole checkpoint if it has one, `never` starts afresh; else a checkpoint.

    A command that names a checkpoint and is started again goes on from what it has saved since."""
    initial_weights: str | None = None
    """A checkpoint (or an imported model) whose weights a new run starts from; null draws them."""


class CheckpointConfig(Section):
    """When checkpoints are written, and which are kept; the last step always is written."""

    every_steps: int = Field(default=1000, gt=0)
    keep_last: int = Field(default=3, gt=0)
    """Newest checkpoints to keep; with more than one, a damaged one does not end a run."""
    keep_every_steps: int | None = Field(default=None, gt=0)
    """Keep those of every n-th step as well; null keeps none."""
    megabytes_per_second: float | None = Field(default=100.0, gt=0)
    """That a rank writes beside training, so that a save is spread over steps; once somebody waits for it, it is
    written as fast as it can be. Null: always so."""


class EvaluateConfig(Section):
    """Evaluation at several retentions during training."""

    every_steps: int = Field(default=500, gt=0)
    strategies: list[str] = Field(default=["full", "every:2", "every:4"], min_length=1)
    """Cache strategies: full, every:G, prefix:M, a list such as 0,4,8, or a name from `profiles`."""
    profiles: dict[str, str] = Field(default={})
    """Named strategies."""
    sequences: int = Field(default=64, gt=0)
    """Held-out sequences; rounded up to whole micro-batches over all replicas."""

    def parse_strategies(self, num_layers: int) -> dict[str, CacheStrategy]:
        """The strategies by the name the user gave them."""
        return {spec: CacheStrategy.parse(spec, num_layers, self.profiles) for spec in self.strategies}


class Config(Section):
    """The tree. `deepspeed` holds further DeepSpeed options, merged into the JSON that is generated from the rest."""

    model: ModelConfig
    routing: RoutingConfig
    parallel: ParallelConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _possible(self) -> Config:
        layers = self.model.num_hidden_layers
        require_possible(self.parallel, self.model, self.data.sequence_length, self.train.precision)
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        if batch % micro:
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro}; "
                f"the nearest ones are {batch - batch % micro} and {batch - batch % micro + micro}"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.train.precision == "fp32" and self.model.attention == "flash":
            raise ValueError("model.attention flash works in bf16 only, but train.precision is fp32; use sdpa or auto")
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps {self.train.warmup_steps} exceeds train.steps {self.train.steps}")
        for spec in self.evaluate.strategies:
            try:
                CacheStrategy.parse(spec, layers, self.evaluate.profiles)
            except UserError as error:
                raise ValueError(f"evaluate.strategies: {error}") from None
        for path, instead in GENERATED_FROM.items():
            section, _, key = path.partition(".")
            if section in self.deepspeed and (not key or key in self.deepspeed[section]):
                raise ValueError(f"deepspeed.{path} cannot be passed through; {instead}")
        if self.offloads_optimizer and self.parallel.zero_stage == 0:
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer has no effect at parallel.zero_stage 0; use 1, 2 or 3"
            )
        device = self._offload_device
        if device not in ("none", "cpu"):
            raise ValueError(
                f"deepspeed.zero_optimization.offload_optimizer.device is {device}, but gradients that are not in "
                f"memory can neither be checked nor weighed by token; use cpu"
            )
        if self.deepspeed.get("zero_force_ds_cpu_optimizer"):
            raise ValueError(
                "deepspeed.zero_force_ds_cpu_optimizer true asks for DeepSpeed's own Adam, but runs train with torch's "
                "AdamW; leave it out"
            )
        return self

    @property
    def num_micro_batches(self) -> int:
        """Q: global micro-batches of one optimizer step."""
        return self.train.global_batch_size // self.train.micro_batch_size

    def plan(self, step: int, routing: RoutingConfig | None = None) -> RoutingPlan:
        """The routing plan of a step (the first is 0), under this configuration's routing or another."""
        return draw_plan(
            routing or self.routing,
            num_layers=self.model.num_hidden_layers,
            num_micro_batches=self.num_micro_batches,
            seed=self.train.seed,
            step=step,
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas that `world_size` ranks make.

        Raises:
            UserError: the world size does not fit the layout, or the batch does not divide over the replicas.
        """
        stages, tensors = self.parallel.pipeline, self.parallel.tensor
        if world_size % (stages * tensors):
            raise UserError(
                f"{world_size} ranks cannot hold parallel.pipeline {stages} stages x parallel.tensor {tensors} ranks; "
                f"start a multiple of {stages * tensors} ranks"
            )
        replicas = world_size // (stages * tensors)
        if self.num_micro_batches % replicas:
            micro = self.train.micro_batch_size
            raise UserError(
                f"train.global_batch_size {self.train.global_batch_size} with micro_batch_size {micro} makes "
                f"{self.num_micro_batches} micro-batches, which {replicas} replicas cannot share equally; "
                f"make the batch a multiple of {micro * replicas}"
            )
        if self.data.lanes % (self.train.micro_batch_size * replicas):
            raise UserError(
                f"data.lanes {self.data.lanes} must be a multiple of train.micro_batch_size x replicas = "
                f"{self.train.micro_batch_size} x {replicas}, so that each replica reads lanes of its own"
            )
        return replicas

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights, moments and the optimizer step are on the host."""
        return self._offload_device != "none"

    @property
    def _offload_device(self) -> str:
        offload = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
        return offload.get("device", "none")

    def deepspeed_json(self, world_size: int) -> dict[str, Any]:
        """The DeepSpeed configuration of this run."""
        replicas = self.data_parallel_size(world_size)
        generated: dict[str, Any] = {
            "train_batch_size": self.train.global_batch_size,
            "train_micro_batch_size_per_gpu": self.train.micro_batch_size,
            "gradient_accumulation_steps": self.num_micro_batches // replicas,
            "gradient_clipping": self.train.gradient_clipping,
            "zero_optimization": {"stage": self.parallel.zero_stage},
            "bf16": {"enabled": self.train.precision == "bf16"},
        }
        if self.train.precision == "bf16":
            generated["data_types"] = {"grad_accum_dtype": "fp32"}
        # DeepSpeed prints nothing of its own unless its timers are asked for.
        timed = self.deepspeed.get("wall_clock_breakdown", False)
        defaults: dict[str, Any] = {
            "steps_per_print": self.train.log_every_steps if timed else None,
            # With offload too the optimizer is torch's AdamW; DeepSpeed's own is compiled when a run starts.
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.train.precision == "bf16":
            # What was accumulated in fp32 is reduced in fp32; DeepSpeed would round it to bf16 on the way.
            defaults["communication_data_type"] = "fp32"
        passed = {**defaults, **self.deepspeed}
        zero = {**passed.pop("zero_optimization", {}), **generated.pop("zero_optimization")}
        return {**passed, **generated, "zero_optimization": zero}

    def to_yaml(self) -> str:
        """The resolved configuration, which `load_config` reads back to the same tree."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


# Keys of DeepSpeed that another key of ours decides, or that would be without effect.
GENERATED_FROM = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "set train.gradient_clipping",
    "zero_optimization.stage": "set parallel.zero_stage",
    "bf16": "set train.precision",
    "fp16": "set train.precision",
    "data_types": "set train.precision",
    "optimizer": "set train.learning_rate and the keys beside it",
    "scheduler": "set train.warmup_steps and train.min_learning_rate_ratio",
    "pipeline": "the routed engine does not use it",
    "activation_checkpointing": "the routed engine does not use it",
}
