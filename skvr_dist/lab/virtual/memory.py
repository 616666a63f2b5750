"""Counts the memory that tensors occupy while a rank trains, by the storages behind them, and its peak.

torch.distributed._tools.MemTracker does as much for a loop that calls each module once a step. A pipeline stage is
called for several micro-batches before the first of them runs back, which it refuses ("does not support memory tracking
for multiple iterative calls", PyTorch 2.13).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Follows every storage that an operation makes within, until nothing holds it any more.

    What a kernel takes for itself while it runs is not seen, nor what the allocator rounds up or keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        """Bytes alive now."""
        self.peak = 0
        """The most bytes that were alive at once since the last `reset_peak`."""
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Begin to look for the peak anew."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.held += self._sizes[key]
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)
