"""The configuration tree of a run, the one typed source of everything else, and the checks across its sections.

It holds values and derives numbers from them, no more: `skvr_dist.config.load` reads it from files, and what is made of
it (plans, DeepSpeed's JSON, engines) is made where it is used.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from skvr_dist.config.data import DataConfig
from skvr_dist.config.deepspeed import offload_device, require_passable
from skvr_dist.config.distillation import ROUTED, DistillationConfig
from skvr_dist.config.layouts import require_possible
from skvr_dist.config.metrics import MetricsConfig
from skvr_dist.config.model import FLASH_KERNELS, ModelConfig
from skvr_dist.config.parallel import ParallelConfig
from skvr_dist.config.train import CheckpointConfig, EvaluateConfig, TrainConfig
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy, RoutingConfig
from skvr_dist.section import Section

MOST_MICRO_BATCHES = 20_000
"""Of one step; more is a batch that was given in tokens."""


class Config(Section):
    """The whole configuration of a run."""

    model: ModelConfig
    routing: RoutingConfig
    parallel: ParallelConfig
    data: DataConfig
    train: TrainConfig
    distillation: DistillationConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: dict[str, Any] = Field(default={})
    """Further options of DeepSpeed, as in its JSON, merged into what is generated from the other sections.

    Those that a key of ours decides are refused. `--dry-run` prints the result."""

    @model_validator(mode="after")
    def _possible(self) -> Config:
        require_possible(self.parallel, self.model, self.data.sequence_length, self.train.precision)
        batch, micro = self.train.global_batch_size, self.train.micro_batch_size
        if batch % micro:
            near = " and ".join(str(each) for each in (batch - batch % micro, batch - batch % micro + micro) if each)
            raise ValueError(
                f"train.global_batch_size {batch} is not a multiple of train.micro_batch_size {micro}; "
                f"near ones: {near}"
            )
        if self.num_micro_batches > MOST_MICRO_BATCHES:
            raise ValueError(
                f"train.global_batch_size {batch} makes {self.num_micro_batches} micro-batches of {micro}; it counts "
                f"sequences, not tokens: use at most {MOST_MICRO_BATCHES * micro}, or a larger "
                f"train.micro_batch_size"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.train.precision == "fp32" and self.model.attention in ("flash", *FLASH_KERNELS):
            raise ValueError(
                f"model.attention {self.model.attention} works in bf16 only, but train.precision is fp32; use sdpa or "
                f"auto"
            )
        for name in self.evaluate.profiles:
            if CacheStrategy.is_spec(name):
                raise ValueError(f"evaluate.profiles: {name} is a strategy itself; give the profile another name")
        try:
            CacheStrategy.parse_all(self.evaluate.profiles.values(), self.model.num_hidden_layers)
        except UserError as error:
            raise ValueError(f"evaluate.profiles: {error}") from None
        try:
            CacheStrategy.parse_all(self.evaluate.strategies, self.model.num_hidden_layers, self.evaluate.profiles)
        except UserError as error:
            raise ValueError(f"evaluate.strategies: {error}") from None
        require_passable(self.deepspeed, self.parallel.zero_stage)
        if self.distillation:
            self._require_distillable(self.distillation)
        return self

    def _require_distillable(self, distillation: DistillationConfig) -> None:
        strategies = [name for name in distillation.passes if name != ROUTED]
        try:
            CacheStrategy.parse_all(strategies, self.model.num_hidden_layers, self.evaluate.profiles)
        except UserError as error:
            raise ValueError(f"distillation.passes: {error}, or routed") from None
        wanted = distillation.share * self.num_micro_batches
        # Six digits of a share will do: that is what refusals name, here and in `data_parallel_size`.
        if not math.isclose(wanted, round(wanted), rel_tol=1e-5) or round(wanted) < 1:
            raise ValueError(
                f"distillation.share {distillation.share:g} of the {self.num_micro_batches} micro-batches of a step is "
                f"{wanted:g}; give a share that makes a whole number, such as "
                f"{max(round(wanted), 1)} / {self.num_micro_batches} = "
                f"{max(round(wanted), 1) / self.num_micro_batches:g}"
            )
        if distillation.is_own and self.routing.policy == "none" and distillation.passes == [ROUTED]:
            raise ValueError(
                "distillation.teacher is self, but routing.policy none draws no donors, so that the routed pass is the "
                "full one; choose another policy, or cache strategies in distillation.passes"
            )

    @property
    def num_micro_batches(self) -> int:
        """Q: global micro-batches of one optimizer step."""
        return self.train.global_batch_size // self.train.micro_batch_size

    @property
    def num_distilled(self) -> int:
        """Of them, those that are distilled."""
        return round(self.distillation.share * self.num_micro_batches) if self.distillation else 0

    @property
    def num_passes(self) -> int:
        """Passes through the decoder of all micro-batches of one optimizer step, a frozen teacher's among them."""
        return self.num_micro_batches + self.num_distilled * (len(self.distillation.passes) if self.distillation else 0)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights, moments and the optimizer step are on the host."""
        return offload_device(self.deepspeed) != "none"
