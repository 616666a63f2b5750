"""Names of a run's checkpoints, for those who only look which are there: this module needs no PyTorch."""

from __future__ import annotations

from pathlib import Path


def step_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def partial_folder(step: int) -> str:
    """Name of that checkpoint while it is being written."""
    return f"{step_folder(step)}.partial"


def candidates(checkpoints: Path) -> list[Path]:
    """The finished checkpoints of a run, the newest first."""
    pattern = "step-" + "[0-9]" * 8
    return sorted((path for path in checkpoints.glob(pattern) if path.is_dir()), reverse=True)
