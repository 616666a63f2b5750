"""What a run reports: console lines, and records for its writers; on rank 0 only."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from skvr_dist.config.metrics import MetricsConfig
from skvr_dist.run.folder import RunFolder
from skvr_dist.train.writers import Values, Writers

# Tag -> how the console shows it; the others are for the writers.
_CONSOLE = {
    "train/loss": "loss {:.4f}",
    "train/predicted_tokens": "over {:,.0f} tokens",
    "train/learning_rate": "lr {:.2e}",
    "train/gradient_norm": "grad norm {:.3f}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "train/mfu": "MFU {:.1%}",
    "routing/cross_layer_share": "cross-layer {:.0%}",
    "routing/skipped_kv_share": "K/V skipped {:.0%}",
}


class Reporter:
    """Writes records of values by tag. On ranks other than 0 it does nothing.

    Args:
        first_step: done before.
        steps: of the whole run.
        console_lost: called when the console takes nothing any longer; from then on it is not written to.
        settings: who takes the records; None: who takes them by default.

    Raises:
        UserError: a writer cannot begin.
    """

    def __init__(
        self,
        rank: int,
        folder: RunFolder,
        *,
        first_step: int,
        steps: int,
        console_lost: Callable[[], None],
        settings: MetricsConfig | None = None,
    ) -> None:
        self._enabled, self._console_lost = rank == 0, console_lost
        self._first_step, self._steps = first_step, steps
        self._started = time.perf_counter()
        if self._enabled:
            self._writers = Writers(settings or MetricsConfig(), folder, first_step, self.say)
            self._evaluated = {
                record["step"] for record in folder.metric_records(about='"evaluate/') if record["step"] <= first_step
            }
            # The bar is for terminals; the lines below carry the time left everywhere else.
            self._bar = tqdm(total=steps, initial=first_step, unit="step", disable=None, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar."""
        if self._enabled:
            try:
                self._bar.write(text)
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.EIO):  # the launcher that read it died; a terminal was closed
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                self._console_lost()

    def step(self, step: int, values: Values, *, show: bool) -> None:
        """Record a finished step (counted from 1); `show` prints it."""
        if not self._enabled:
            return
        self._writers.write(step, values)
        self._bar.update()
        if show:
            shown = "  ".join(text.format(values[tag]) for tag, text in _CONSOLE.items() if tag in values)
            shown = shown.replace("MFU nan%", "MFU n/a")
            self.say(f"step {step:>{len(str(self._steps))}}/{self._steps}  {shown}  {self._time_left(step)} left")

    def evaluation(self, step: int, losses: Values) -> None:
        """Record held-out losses by strategy; once, however often a run is started again at this step."""
        if not self._enabled or step in self._evaluated:
            return
        self._writers.write(step, {f"evaluate/loss/{name}": loss for name, loss in losses.items()})
        self.say(f"step {step}  held-out loss  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))

    def close(self) -> None:
        """Close the writers and the progress bar."""
        if self._enabled:
            self._writers.close()
            self._bar.close()

    def _time_left(self, step: int) -> str:
        done = step - self._first_step
        seconds = round((time.perf_counter() - self._started) / done * (self._steps - step))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
