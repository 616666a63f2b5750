"""What a checkpoint says of the configuration of a run that starts from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skvr_dist.checkpoint.folder import Checkpoint


def base_of(start: Path) -> dict[str, Any]:
    """A plain tree for `load_config` to begin with: the model, its tokenizer, and where the first weights come from.

    Args:
        start: an imported model, or a checkpoint of a run.

    Raises:
        UserError: it is none.
    """
    checkpoint = Checkpoint(start)
    file = checkpoint.tokenizer_file
    return {
        "model": checkpoint.model_config.model_dump(),
        "data": {"tokenizer": str(file)} if file else {},
        "train": {"initial_weights": str(start)},
    }
