"""What a run says of its attention at its start: which it takes and why, and what that costs where it is slow."""

from __future__ import annotations

import torch

from skvr_dist.config.model import AttentionName
from skvr_dist.config.tree import Config
from skvr_dist.model.attention_choice import LARGEST_HEAD, Choice, takes_arena, why_no_arena

_SHORT = 1024  # tokens, below which scores are small beside the rest


def reads_from_arena(config: Config, device: torch.device) -> bool:
    """Whether our kernel computes attention in the passes of a run that are trained on this device."""
    return takes_arena(*_passes(config, device))


def _passes(config: Config, device: torch.device) -> tuple[AttentionName, torch.device, torch.dtype, int, int, int]:
    """Those that are trained, as `takes_arena` takes them."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rows = config.train.micro_batch_size if config.routing.draws_per == "sequence" else 1
    return config.model.attention, device, dtype, config.model.head_dim, config.data.sequence_length, rows


def kernels_of(config: Config, choice: Choice, device: torch.device) -> dict[str, object]:
    """What all ranks of a run must agree on, by what it is called."""
    return {"attention": choice.name, "attention from an arena": reads_from_arena(config, device)}


def attention_notices(config: Config, choice: Choice, device: torch.device) -> list[str]:
    """What is taken, and a warning if it costs much more than flash kernels would.

    Args:
        choice: of the run's model.
        device: that trains.
    """
    if choice.name != "routed" and reads_from_arena(config, device):
        others = f"where they share donors {choice.name} ({choice.reason})"
        return [f"attention: routed (sequences of {config.data.sequence_length:,} tokens have donors each); {others}"]
    if why := why_no_arena(*_passes(config, device)):
        choice = Choice(choice.name, f"{choice.reason}; not routed, made for short sequences with donors each: {why}")
    warning = _warning(config, choice) if device.type == "cuda" else None
    return [str(choice), *([warning] if warning else [])]


def _warning(config: Config, choice: Choice) -> str | None:
    """What attention costs on a GPU that is no flash kernel; None: nothing worth a word."""
    model, sequence = config.model, config.data.sequence_length
    if sequence < _SHORT:
        return None
    if choice.name == "eager":
        return f"WARNING: attention takes the formula, {_all_scores(config, 4)}; set model.attention to auto"
    if choice.name != "sdpa" or config.data.documents == "joined":
        return None  # a flash kernel of its own, or the memory-efficient one
    if config.train.precision == "fp32" or model.head_dim % 8 == 0:
        cost = (
            f"a mask of {sequence:,} x {sequence:,} for each sequence, under which all scores are computed, those "
            f"between documents too"
        )
    else:  # the memory-efficient kernel takes no mask in bf16 for such heads
        cost = f"PyTorch's math path, {_all_scores(config, 2)}"
    return f"WARNING: attention takes {cost}; {_way_out(config, choice)}"


def _all_scores(config: Config, element_size: int) -> str:
    """What one rank keeps of a layer's scores, in words."""
    batch, sequence = config.train.micro_batch_size, config.data.sequence_length
    heads = config.model.num_attention_heads // config.parallel.tensor
    return (
        f"which keeps all scores: {batch} x {heads} heads x {sequence:,} x {sequence:,}, "
        f"{batch * heads * sequence**2 * element_size / 2**20:,.0f} MiB for each of several copies in a layer"
    )


def _way_out(config: Config, choice: Choice) -> str:
    if config.model.head_dim % 8 or config.model.head_dim > LARGEST_HEAD:
        return f"no flash kernel takes model.head_dim {config.model.head_dim}, only multiples of 8 up to {LARGEST_HEAD}"
    settings = []
    if config.train.precision == "fp32":
        settings.append("train.precision to bf16")
    if config.model.attention == "sdpa":
        settings.append("model.attention to auto")
    if settings:
        return f"set {' and '.join(settings)}, which takes a flash kernel"
    return f"no flash kernel can be had: {choice.reason}"
