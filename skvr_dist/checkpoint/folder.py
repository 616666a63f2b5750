"""Checkpoints of a run: complete folders, and one file that names the latest.

A checkpoint `step-00000100/` holds

    config.yaml          the resolved configuration of the run
    checkpoint.json      step, tokens seen, layout, routing, versions, fingerprint of the data, sizes of the files
    tokenizer.model      the tokenizer of its data
    model-*.safetensors  weights under canonical names
    *.pt                 DeepSpeed's optimizer states, for resuming on the same layout

It is written under a temporary name and renamed when every rank has finished, and `latest` moves after that: a folder
with a final name is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from skvr_dist.checkpoint.weights import WeightFiles
from skvr_dist.errors import UserError
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.decoder import Decoder

CONFIG_FILE, FACTS_FILE, TOKENIZER_FILE, LATEST_FILE = "config.yaml", "checkpoint.json", "tokenizer.model", "latest"


def step_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def partial_folder(step: int) -> str:
    """Name of that checkpoint while it is being written."""
    return f"{step_folder(step)}.partial"


def clear_partial(checkpoints: Path, step: int) -> None:
    """Remove what an interrupted save of that step left; on one rank, before any writes."""
    shutil.rmtree(checkpoints / partial_folder(step), ignore_errors=True)


def publish(checkpoints: Path, step: int, *, config_text: str, facts: dict[str, Any], tokenizer: Path | None) -> Path:
    """Complete the partial folder of `step` and make it the latest checkpoint; on one rank, after all have written."""
    partial, final = checkpoints / partial_folder(step), checkpoints / step_folder(step)
    (partial / CONFIG_FILE).write_text(config_text, encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    (partial / FACTS_FILE).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    replaced = checkpoints / f"{final.name}.replaced"
    if final.exists():  # the run came by this step before
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = checkpoints / f"{LATEST_FILE}.partial"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    pointer.replace(checkpoints / LATEST_FILE)
    return final


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when nothing has been saved."""
    pointer = checkpoints / LATEST_FILE
    return checkpoints / pointer.read_text(encoding="utf-8").strip() if pointer.exists() else None


class Checkpoint:
    """A finished checkpoint, read in one process without a process group.

    Args:
        path: the checkpoint's folder, or that of its run, which stands for the run's latest checkpoint.

    Raises:
        UserError: nothing complete is there, or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        if not (folder / FACTS_FILE).exists():
            latest = latest_checkpoint(folder / "checkpoints")
            if latest is None:
                raise UserError(
                    f"{folder} is neither a checkpoint (it has no {FACTS_FILE}) nor the folder of a run that saved one"
                )
            folder = latest
        self.folder = folder
        try:
            self.config_text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            self.facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            files: dict[str, int] = self.facts["files"]
            self.config_tree: dict[str, Any] = yaml.safe_load(self.config_text)
            self.model_config = ModelConfig.model_validate(self.config_tree["model"])
        except (OSError, ValueError, KeyError, yaml.YAMLError, ValidationError) as error:
            raise UserError(f"checkpoint {folder} is damaged ({' '.join(str(error).split())}); use another") from None
        for name, size in files.items():
            file = folder / name
            if not file.exists() or file.stat().st_size != size:
                found = f"has {file.stat().st_size} bytes" if file.exists() else "is missing"
                raise UserError(f"checkpoint {folder} is damaged: {name} {found}, not {size}; use another checkpoint")
        self._weights = WeightFiles(folder)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.facts["step"])

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / TOKENIZER_FILE

    def weight_names(self) -> list[str]:
        """Canonical names of all weights."""
        return self._weights.names()

    def weight(self, name: str) -> Tensor:
        """One weight, on the host, in its stored dtype."""
        return self._weights.read(name)

    def load_decoder(self) -> Decoder:
        """The whole trained decoder, in float32 on the CPU, for evaluation."""
        with torch.device("meta"):  # no initial weights are drawn
            decoder = Decoder(self.model_config)
        decoder.to_empty(device="cpu")
        self._weights.copy_into(decoder)
        return decoder.eval()
