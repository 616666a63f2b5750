"""A Hugging Face folder, such as an export, where a checkpoint is asked for: read where it lies, without a copy."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import IMPORTED_TOKENIZER_FILE, Checkpoint
from skvr_dist.config.stored import StoredConfig
from skvr_dist.errors import UserError
from skvr_dist.files import local_path
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.hf.convert.source_folder import SourceFolder
from skvr_dist.hf.convert.weights import check_names, parameter_shapes

CONFIG_FILE = "config.json"


def open_model(path: str | Path) -> Checkpoint:
    """A checkpoint, the latest one of a run, or a Hugging Face folder.

    Raises:
        UserError: nothing that can be evaluated is there.
    """
    folder = local_path(path)
    return OpenedFolder(folder) if (folder / CONFIG_FILE).exists() else Checkpoint(folder)


class OpenedFolder(Checkpoint):
    """A folder with config.json and safetensors files, as its import would be; an export's profiles are kept.

    There is no manifest to compare it with, and nothing to resume from.

    Raises:
        UserError: it is no model that can be imported, or it was pruned.
    """

    def __init__(self, folder: Path) -> None:
        self._source = SourceFolder(folder)
        self.folder, self.model_config = folder, self._source.config
        shapes = parameter_shapes(hf_config(self.model_config, torch.float32, {}))
        check_names(self._source.names(), shapes, self.model_config.architecture, self._source.way_out)
        self._names = list(shapes)
        profiles = dict(getattr(self._source.published, "kv_profiles", None) or {})
        self.config = StoredConfig.model_validate(
            {
                "model": self.model_config.model_dump(),
                "routing": {"policy": "none"},
                "evaluate": {"profiles": profiles},
            }
        )
        ids = self._source.special_ids or None
        self.facts = Facts(step=0, tokens_seen=0, imported_from=str(folder), special_ids=ids)

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json; None where there is none."""
        file = self.folder / IMPORTED_TOKENIZER_FILE
        return file if file.exists() else None

    @property
    def has_moments(self) -> bool:
        """Training cannot resume from it."""
        return False

    def weight_names(self) -> list[str]:
        """Canonical names of all weights."""
        return self._names

    def weight_dtype(self, name: str) -> torch.dtype:
        """The precision that a weight is stored in."""
        return self._source.shape_and_dtype(name)[1]

    def stored_weight(self, name: str) -> Tensor:
        """One whole weight, on the host; raises `UserError` if it holds what is no number."""
        tensor = self._source.read(name)
        if not tensor.isfinite().all():
            raise UserError(f"weight {name} of {self.folder} holds NaN or infinite values; give another model")
        return tensor
