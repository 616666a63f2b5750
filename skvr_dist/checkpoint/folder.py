"""A checkpoint on disk, and the checkpoints of a run.

    config.yaml        the resolved configuration of the run
    checkpoint.json    step, tokens seen, layout, routing, data fingerprint, software versions
    index.json         which tensors there are, whole, and in which file which part of them is
    *.distcp           the parts: weights (fp32 masters where there are any) and Adam's moments
    tokenizer.model    the tokenizer the data was made with, where there is one; an import has the files it came with
    manifest.json      size and SHA-256 of every file above
    manifest.sha256    SHA-256 of the manifest

It is written under a temporary name and renamed when every file is on disk, and `latest` moves after that. A folder
with a final name whose manifest holds is complete and undamaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from skvr_dist.checkpoint.pieces import WEIGHTS
from skvr_dist.checkpoint.storage import Index
from skvr_dist.checkpoint.stored_config import StoredConfig
from skvr_dist.errors import UserError
from skvr_dist.model.decoder import Decoder

CONFIG_FILE, FACTS_FILE, TOKENIZER_FILE, LATEST_FILE = "config.yaml", "checkpoint.json", "tokenizer.model", "latest"
IMPORTED_TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE, DIGEST_FILE = "manifest.json", "manifest.sha256"
ORIGIN_FACTS = ("imported_from", "dequantized_from")
"""Facts about where weights came from, which a run hands on from those it starts with."""
FORMAT = 2
"""Version of this layout of files; another one is refused."""
_READ_BYTES = 1 << 22


def step_folder(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def partial_folder(step: int) -> str:
    """Name of that checkpoint while it is being written."""
    return f"{step_folder(step)}.partial"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_facts(partial: Path, *, config_text: str, facts: dict[str, Any], tokenizer: Path | None) -> None:
    """Put what describes a checkpoint beside its tensors; on one rank."""
    (partial / CONFIG_FILE).write_text(config_text, encoding="utf-8")
    (partial / FACTS_FILE).write_text(json.dumps({"format": FORMAT, **facts}, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / TOKENIZER_FILE)


def publish(partial: Path, final: Path, digests: dict[str, str]) -> None:
    """Complete a partial folder under its final name; on one rank, after all files were written.

    Args:
        digests: SHA-256 of the files for which it is known from writing them, by name; the others are read.

    Raises:
        OSError: a file cannot be written, or one of those in `digests` is not here.
    """
    names = sorted(digests.keys() | {file.name for file in partial.iterdir()})
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": digests.get(name) or sha256_of(partial / name)}
        for name in names
    }
    manifest = json.dumps({"files": files}, indent=1).encode()
    (partial / MANIFEST_FILE).write_bytes(manifest)
    (partial / DIGEST_FILE).write_bytes(hashlib.sha256(manifest).hexdigest().encode())
    if final.exists():  # the run came by this step before; what is there is damaged, or it would have gone on from it
        shutil.rmtree(final)
    partial.rename(final)
    pointer = final.parent / f"{LATEST_FILE}.partial"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    pointer.replace(final.parent / LATEST_FILE)


def candidates(checkpoints: Path) -> list[Path]:
    """The finished checkpoints of a run, the newest first."""
    return sorted((path for path in checkpoints.glob("step-????????") if path.is_dir()), reverse=True)


def forget_old(checkpoints: Path, *, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those of every n-th step; returns what was deleted."""
    old = candidates(checkpoints)[keep_last:]
    deleted = [p for p in old if keep_every_steps is None or int(p.name.removeprefix("step-")) % keep_every_steps]
    for path in deleted:
        shutil.rmtree(path)
    return deleted


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, by name, after a check of the manifest itself and of the sizes.

    Raises:
        UserError: a file is missing or has another size, or the manifest is damaged.
    """
    try:
        manifest, digest = (folder / MANIFEST_FILE).read_bytes(), (folder / DIGEST_FILE).read_bytes()
    except OSError as error:
        raise UserError(
            f"checkpoint {folder} is incomplete ({error.strerror}: {error.filename}); use another"
        ) from None
    if hashlib.sha256(manifest).hexdigest().encode() != digest:
        raise UserError(f"checkpoint {folder} is damaged: {DIGEST_FILE} does not fit {MANIFEST_FILE}; use another")
    files: dict[str, dict[str, Any]] = json.loads(manifest)["files"]
    for name, facts in files.items():
        file = folder / name
        found = f"has {file.stat().st_size} bytes" if file.exists() else "is missing"
        if found != f"has {facts['bytes']} bytes":
            raise UserError(f"checkpoint {folder} is damaged: {name} {found}, not {facts['bytes']} bytes; use another")
    return files


def damaged_files(folder: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    """Those of the named files whose content is not what the manifest says."""
    return [name for name in names if sha256_of(folder / name) != files[name]["sha256"]]


class Checkpoint:
    """A finished checkpoint, read in one process without a process group.

    Args:
        path: the checkpoint's folder, or that of its run, which stands for the run's newest whole checkpoint.
        verify: also compare the SHA-256 of every file.

    Raises:
        UserError: nothing complete is there, or it is damaged.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        folder = Path(path)
        if not (folder / FACTS_FILE).exists():
            found = candidates(folder / "checkpoints")
            if not found:
                raise UserError(
                    f"{folder} is neither a checkpoint (it has no {FACTS_FILE}) nor the folder of a run that saved one"
                )
            folder = found[0]
        self.folder = folder
        self.files = read_manifest(folder)
        if verify and (damaged := damaged_files(folder, self.files, self.files)):
            raise UserError(f"checkpoint {folder} is damaged: {', '.join(damaged)} changed since it was written")
        try:
            self.config_text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
            self.facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            if (written := self.facts["format"]) != FORMAT:
                age, way_out = ("newer", "update skvr_dist") if written > FORMAT else ("older", "use its own release")
                raise UserError(
                    f"checkpoint {folder} has format {written}, {age} than this release's {FORMAT}; {way_out}"
                )
            self.config_tree: dict[str, Any] = yaml.safe_load(self.config_text)
            self.config = StoredConfig.model_validate(self.config_tree)
            self.model_config = self.config.model
            self.index = Index(folder)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, yaml.YAMLError, ValidationError) as error:
            raise UserError(f"checkpoint {folder} is damaged ({' '.join(str(error).split())}); use another") from None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.facts["step"])

    @property
    def tokenizer_file(self) -> Path | None:
        """What came along when it was imported, or the tokenizer of its data; None without one."""
        files = [self.folder / name for name in (IMPORTED_TOKENIZER_FILE, TOKENIZER_FILE)]
        return next((file for file in files if file.exists()), None)

    @property
    def is_trained(self) -> bool:
        """Whether a run of ours wrote it; otherwise it is an import."""
        return "data_fingerprint" in self.facts

    @property
    def origin(self) -> dict[str, Any]:
        """Where its weights, or those it was trained on from, were imported from."""
        return {name: self.facts[name] for name in ORIGIN_FACTS if name in self.facts}

    @property
    def has_moments(self) -> bool:
        """Whether training can go on from it; a weights-only checkpoint is a start."""
        return any(not name.startswith(WEIGHTS) for name in self.index.names())

    def weight_names(self) -> list[str]:
        """Canonical names of all weights."""
        return [name.removeprefix(WEIGHTS) for name in self.index.names() if name.startswith(WEIGHTS)]

    def weight(self, name: str) -> Tensor:
        """One whole weight, on the host, in the precision it was trained in."""
        return self.index.read(WEIGHTS + name).to(self.weight_dtype(name))

    def weight_dtype(self, name: str) -> torch.dtype:
        """The precision it was trained in; stored are the master weights."""
        return torch.bfloat16 if self.config.train.precision == "bf16" else self.index.dtype(WEIGHTS + name)

    @torch.no_grad()
    def load_decoder(self) -> Decoder:
        """The whole trained decoder, in float32 on the CPU, for evaluation."""
        with torch.device("meta"):  # no initial weights are drawn
            decoder = Decoder(self.model_config)
        decoder.to_empty(device="cpu")
        for name, parameter in decoder.named_parameters():
            stored = self.weight(name)
            if stored.shape != parameter.shape:
                raise UserError(
                    f"weight {name} has shape {list(stored.shape)} in {self.folder}, but its configuration makes it "
                    f"{list(parameter.shape)}; the checkpoint does not fit together"
                )
            parameter.copy_(stored)
        return decoder.eval()
