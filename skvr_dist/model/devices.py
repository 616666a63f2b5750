"""How tensors that the host makes for each micro-batch come onto the device that trains."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device that trains; one of the host without waiting for what the device is doing.

    Only from pinned memory is a copy free of the host, and only if nothing has to be made contiguous for it.
    """
    if device.type == "cpu" or not tensor.is_cpu:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
