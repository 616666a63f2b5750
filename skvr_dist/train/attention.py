"""What a run says of its attention at its start: which it takes and why, and what that costs where it is slow."""

from __future__ import annotations

import torch

from skvr_dist.config.tree import Config
from skvr_dist.model.attention_choice import LARGEST_HEAD, Choice

_SHORT = 1024  # tokens, below which scores are small beside the rest


def attention_notices(config: Config, choice: Choice, device: torch.device) -> list[str]:
    """What is taken, and a warning if it costs much more than flash kernels would.

    Args:
        choice: of the run's model.
        device: that trains.
    """
    warning = _sdpa_warning(config, choice) if choice.name == "sdpa" and device.type == "cuda" else None
    return [str(choice), *([warning] if warning else [])]


def _sdpa_warning(config: Config, choice: Choice) -> str | None:
    """What SDPA costs on a GPU if none of its own fast kernels takes this run's attention; None if one does."""
    model, sequence = config.model, config.data.sequence_length
    if sequence < _SHORT:
        return None
    masked, is_fp32 = config.data.documents == "separate", config.train.precision == "fp32"
    heads = model.num_attention_heads // config.parallel.tensor
    is_grouped = heads > max(1, model.num_key_value_heads // config.parallel.tensor)
    # SDPA's flash kernel takes neither masks nor fp32 nor large heads, its memory-efficient one no grouped heads and,
    # in bf16, no masks for head sizes off the grid; for everything else it computes the formula.
    if (is_grouped and (masked or is_fp32 or model.head_dim > LARGEST_HEAD)) or (
        masked and not is_fp32 and model.head_dim % 8
    ):
        batch = config.train.micro_batch_size
        gib = batch * heads * sequence**2 * (4 if is_fp32 else 2) / 2**30
        cost = (
            f"PyTorch's math path, which keeps all scores: {batch} x {heads} heads x {sequence:,} x {sequence:,}, "
            f"{gib:.1f} GiB for each of several copies in a layer"
        )
    elif masked:
        cost = (
            f"a mask of {sequence:,} x {sequence:,} for each sequence, under which all scores are computed, those "
            f"between documents too"
        )
    else:
        return None
    return f"WARNING: attention takes {cost}; {_way_out(config, choice)}"


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
