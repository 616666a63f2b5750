"""Whether a step's update is applied: never if loss or gradient is not finite, nor, if asked for, at a spike.

All ranks decide alike, before the optimizer step, from sums over the world. An update that is refused is dropped
exactly (`skvr_dist.parallel.engine.gradients`): weights and moments stay as they are, while the step counter and the
learning-rate schedule, which are functions of the step, advance. The batch is gone, as if the run had never trained on
it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch

from skvr_dist.errors import UserError

_HISTORY = 32  # losses whose median a spike is measured against
_LARGEST_SQUARE = torch.finfo(torch.float32).max  # DeepSpeed squares norms in fp32


class UpdateGuard:
    """Decides whether a step's update is applied, and counts those that are not.

    Args:
        max_loss_ratio: refuse a loss above this multiple of the median of the last 32 finite ones; None: any finite
            loss will do.
        max_skipped_in_a_row: the run ends after as many refused updates without one applied between.
    """

    def __init__(self, *, max_loss_ratio: float | None, max_skipped_in_a_row: int) -> None:
        self._max_loss_ratio = max_loss_ratio
        self._max_skipped_in_a_row = max_skipped_in_a_row
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._skipped_in_a_row = 0
        self.skipped_steps = 0
        """Updates refused since the run began, restarts included."""
        self.reason: str | None = None
        """Why the last update was refused; None when it was applied."""

    def admits(self, loss: float, square: float, tokens: int) -> bool:
        """Whether the update may be applied. Equal arguments give the same answer on every rank.

        Args:
            loss: the mean over the global batch.
            square: a bound of the gradient's squared norm: gradients that several ranks hold may be counted each time.
            tokens: labels that the loss is the mean of.
        """
        self.reason = self._why_not(loss, square, tokens)
        if math.isfinite(loss):
            self._losses.append(loss)
        refused = self.reason is not None
        self.skipped_steps += refused
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if refused else 0
        return not refused

    def _why_not(self, loss: float, square: float, tokens: int) -> str | None:
        if not tokens:
            return "none of its tokens has a label to predict"
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not square <= _LARGEST_SQUARE:  # nan compares false
            return "its gradient is not finite"
        if self._max_loss_ratio is not None and self._losses:
            median = statistics.median(self._losses)
            if loss > self._max_loss_ratio * median:
                return (
                    f"its loss {loss:.4f} is above train.max_loss_ratio {self._max_loss_ratio:g} times the median "
                    f"{median:.4f} of the last {len(self._losses)}"
                )
        return None

    def require_progress(self, step: int) -> None:
        """End a run whose updates are all refused.

        Raises:
            UserError: too many in a row, the same on every rank.
        """
        if self._skipped_in_a_row >= self._max_skipped_in_a_row:
            raise UserError(
                f"step {step} was the {self._skipped_in_a_row}. step in a row whose update was skipped, the last one "
                f"because {self.reason}, and train.max_skipped_steps_in_a_row is {self._max_skipped_in_a_row}; resume "
                f"from an earlier checkpoint with a lower train.learning_rate, or look at the data of these steps"
            )

    def state(self) -> dict[str, Any]:
        """The guard's state for a checkpoint, as JSON values."""
        return {
            "losses": list(self._losses),
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._losses = deque(state["losses"], maxlen=_HISTORY)
        self.skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
