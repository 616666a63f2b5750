"""Model weights on disk: safetensors under canonical names, split over files in any way.

A writer stores what it holds; a reader looks names up in whichever file has them. So a file layout never ties
weights to the number of stages that wrote them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skvr_dist.errors import UserError

_PATTERN = "model-*.safetensors"


def save_weights(folder: Path, module: nn.Module, *, part: int, parts: int) -> None:
    """Write the parameters of one part of the model, in their own dtype, as `model-PART-of-PARTS.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in module.named_parameters()}
    save_file(tensors, folder / f"model-{part:05d}-of-{parts:05d}.safetensors")


class WeightFiles:
    """Lazy access by name to the weights in a folder.

    Raises:
        UserError: no weights there, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        files = sorted(folder.glob(_PATTERN))
        parts = {file.stem.rpartition("-of-")[2] for file in files}
        if len(parts) > 1 or (parts and len(files) != int(parts.pop())):
            raise UserError(f"weights in {folder} are not one complete set: {', '.join(file.name for file in files)}")
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"weights {file} are damaged or incomplete ({error}); use another checkpoint") from None
        if not self._file_of:
            raise UserError(f"{folder} holds no weights ({_PATTERN}); give the folder of a checkpoint")

    def names(self) -> list[str]:
        return sorted(self._file_of)

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the host, in its stored dtype."""
        if name not in self._file_of:
            raise UserError(f"{self._folder} has no weight {name}; it is a checkpoint of another architecture")
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Copy every parameter of `module` from here, in the parameter's dtype.

        Raises:
            UserError: a weight is missing or has another shape.
        """
        for name, parameter in module.named_parameters():
            stored = self.read(name)
            if stored.shape != parameter.shape:
                raise UserError(
                    f"weight {name} has shape {list(stored.shape)} in {self._folder}, but {list(parameter.shape)} in "
                    f"this configuration; use the model section of the checkpoint's config.yaml"
                )
            parameter.copy_(stored)
