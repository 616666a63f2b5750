"""The DeepSpeed configuration of a run, generated from ours."""

from __future__ import annotations

from typing import Any

from skvr_dist.config.layouts import data_parallel_size
from skvr_dist.config.tree import Config


def deepspeed_json(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of this run."""
    replicas = data_parallel_size(config, world_size)
    generated: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches // replicas,
        "gradient_clipping": config.train.gradient_clipping,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "bf16": {"enabled": config.train.precision == "bf16"},
    }
    if config.train.precision == "bf16":
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    # DeepSpeed prints nothing of its own unless its timers are asked for.
    timed = config.deepspeed.get("wall_clock_breakdown", False)
    defaults: dict[str, Any] = {
        "steps_per_print": config.train.log_every_steps if timed else None,
        # With offload too the optimizer is torch's AdamW; DeepSpeed's own is compiled when a run starts.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # What was accumulated in fp32 is reduced in fp32; DeepSpeed would round it to bf16 on the way.
        defaults["communication_data_type"] = "fp32"
    passed = {**defaults, **config.deepspeed}
    zero = {**passed.pop("zero_optimization", {}), **generated.pop("zero_optimization")}
    return {**passed, **generated, "zero_optimization": zero}
