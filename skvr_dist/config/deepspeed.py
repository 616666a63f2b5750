"""The `deepspeed:` section: options that are passed through to DeepSpeed, and those that are refused.

`skvr_dist.parallel.engine.deepspeed_json` merges them with what is generated from the other sections.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of DeepSpeed that another key of ours decides, that would be without effect, or that would have a wrong one.
_GENERATED_FROM = {
    "train_batch_size": "set train.global_batch_size",
    "train_micro_batch_size_per_gpu": "set train.micro_batch_size",
    "gradient_accumulation_steps": "set train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "set train.gradient_clipping",
    "zero_optimization.stage": "set parallel.zero_stage",
    "bf16": "set train.precision",
    "fp16": "set train.precision",
    "data_types": "set train.precision",
    "torch_autocast": "set train.precision",
    "optimizer": "set train.learning_rate and the keys beside it",
    "scheduler": "set train.warmup_steps and train.min_learning_rate_ratio",
    "pipeline": "the routed engine does not use it",
    "activation_checkpointing": "the routed engine does not use it",
    "tensor_parallel": "set parallel.tensor",
    # Gradients are means over all tokens of the global batch, which the engine weighs itself.
    "prescale_gradients": "gradients are means over the tokens of the global batch already",
    "gradient_predivide_factor": "gradients are means over the tokens of the global batch already",
    "gradient_allreduce_op": "gradients are means over the tokens of the global batch already",
    "zero_optimization.compute_grad_norm": "every step reports the norm of its gradient",
    "zero_optimization.cpu_offload": "set deepspeed.zero_optimization.offload_optimizer={device: cpu}",
    "zero_optimization.cpu_offload_param": "set deepspeed.zero_optimization.offload_param={device: cpu}",
}


def offload_device(options: Mapping[str, Any]) -> str:
    """Where the optimizer's state and step are: "none" for the accelerator, "cpu" for the host."""
    offload = options.get("zero_optimization", {}).get("offload_optimizer") or {}
    return str(offload.get("device", "none"))


def require_passable(options: Mapping[str, Any], zero_stage: int) -> None:
    """Refuse options that another key decides, or that would do something else than they say.

    Raises:
        ValueError: names the option, and what to use instead.
    """
    for name in ("zero_optimization", "data_types", "checkpoint"):
        if not isinstance(options.get(name, {}), Mapping):
            raise ValueError(f"deepspeed.{name} is {options[name]!r}; it must hold options")
    offload = options.get("zero_optimization", {}).get("offload_optimizer")
    if not isinstance(offload, Mapping | None):
        raise ValueError(
            f"deepspeed.zero_optimization.offload_optimizer is {offload!r}; it must hold options, such as device: cpu"
        )
    for path, instead in _GENERATED_FROM.items():
        section, _, key = path.partition(".")
        if section in options and (not key or key in options[section]):
            raise ValueError(f"deepspeed.{path} cannot be passed through; {instead}")
    device = offload_device(options)
    if device != "none" and zero_stage == 0:
        raise ValueError(
            "deepspeed.zero_optimization.offload_optimizer has no effect at parallel.zero_stage 0; use 1, 2 or 3"
        )
    if device not in ("none", "cpu"):
        raise ValueError(
            f"deepspeed.zero_optimization.offload_optimizer.device is {device}, but gradients that are not in "
            f"memory can neither be checked nor weighed by token; use cpu"
        )
    if options.get("zero_optimization", {}).get("round_robin_gradients"):
        raise ValueError(
            "deepspeed.zero_optimization.round_robin_gradients true makes DeepSpeed take one weight's gradient for "
            "another's where it is read or saved; leave it out"
        )
    ratio = offload.get("ratio", 1) if isinstance(offload, Mapping) else 1
    if ratio != 1:
        raise ValueError(
            f"deepspeed.zero_optimization.offload_optimizer.ratio is {ratio!r}, but torch's AdamW, which runs train "
            f"with, takes its step where all of its state is; leave it out"
        )
    if options.get("steps_per_print") == 0:
        raise ValueError(
            "deepspeed.steps_per_print is 0, by which DeepSpeed divides; leave it out, and DeepSpeed prints nothing"
        )
    if options.get("zero_force_ds_cpu_optimizer"):
        raise ValueError(
            "deepspeed.zero_force_ds_cpu_optimizer true asks for DeepSpeed's own Adam, but runs train with torch's "
            "AdamW; leave it out"
        )
