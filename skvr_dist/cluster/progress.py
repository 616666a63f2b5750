"""How far a run has come, as its folder shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from skvr_dist.checkpoint.names import candidates, step_folder
from skvr_dist.errors import UserError
from skvr_dist.run.folder import RunFolder


class Progress:
    """Whether a run has saved anything, and whether it is through.

    Args:
        output_dir: its `train.output_dir`; it may not exist yet.

    Raises:
        UserError: it is no folder.
    """

    def __init__(self, output_dir: Path) -> None:
        self._run = RunFolder(output_dir)
        if self._run.path.exists() and not self._run.path.is_dir():
            raise UserError(f"{self._run.path} is not a folder; give the run's train.output_dir as --output-dir")

    def latest(self) -> Path | None:
        """The run's newest finished checkpoint."""
        return next(iter(candidates(self._run.checkpoints)), None)

    def interruption(self) -> dict[str, Any] | None:
        """What last had its ranks save and end; each time it is another one."""
        return self._run.interruption()

    def asked_to_end(self, before: dict[str, Any] | None) -> str | None:
        """In words, the signal that has had the ranks save and end, if one has.

        Args:
            before: the interruption that was known before they started.
        """
        now = self.interruption()
        return f"{now['by']} to a rank" if now and now != before else None

    def finished(self) -> bool:
        """Whether the checkpoint of the run's last step is there."""
        config = self._run.config
        if not config.exists():
            raise UserError(
                f"the command ended well, but {config} is not there; give its train.output_dir as --output-dir"
            )
        try:
            steps = int(yaml.safe_load(config.read_bytes())["train"]["steps"])
        except (ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{config} names no train.steps ({reason}); remove it, the run writes it anew") from None
        latest = self.latest()
        return latest is not None and latest.name == step_folder(steps)
