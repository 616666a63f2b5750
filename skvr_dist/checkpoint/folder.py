"""A checkpoint on disk, and the checkpoints of a run.

    config.yaml        the resolved configuration of the run
    checkpoint.json    step, tokens seen, layout, routing, data fingerprint, software versions
    index.json         which tensors there are, whole, and in which file which part of them is
    *.distcp           the parts: weights (fp32 masters where there are any) and Adam's moments
    tokenizer.model    the tokenizer the data was made with, where there is one; an import has the files it came with,
                       and so has a run that trains it on with the same tokenizer (`skvr_dist.checkpoint.brought`)
    manifest.json      size and SHA-256 of every file above
    manifest.sha256    SHA-256 of the manifest

It is written under a temporary name and renamed when every file is on disk, and `latest` moves after that. A folder
with a final name whose manifest holds is complete and undamaged.

Every reader compares all of a checkpoint with these digests: `Checkpoint` compares the small files when it is opened,
and the tensors as it reads them, including those that nobody asks for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from pydantic import ValidationError
from torch import Tensor

from skvr_dist.checkpoint.facts import FORMAT, OLDEST_FORMAT, Facts
from skvr_dist.checkpoint.names import candidates as candidates
from skvr_dist.checkpoint.names import partial_folder as partial_folder
from skvr_dist.checkpoint.names import step_folder as step_folder
from skvr_dist.checkpoint.pieces import WEIGHTS, Pieces
from skvr_dist.checkpoint.storage import INDEX_FILE, TENSORS_SUFFIX, Index
from skvr_dist.config.model import FLASH_KERNELS
from skvr_dist.config.stored import StoredConfig
from skvr_dist.errors import UserError
from skvr_dist.files import MANIFEST_FILE, local_path, sha256_of, write_whole
from skvr_dist.host_group import HostGroup
from skvr_dist.model.decoder import Decoder
from skvr_dist.run.folder import RunFolder
from skvr_dist.section import in_words

CONFIG_FILE, FACTS_FILE, TOKENIZER_FILE, LATEST_FILE = "config.yaml", "checkpoint.json", "tokenizer.model", "latest"
IMPORTED_TOKENIZER_FILE = "tokenizer.json"
ASIDE_FOLDER = "set-aside"
"""Folder among a run's checkpoints for those of a branch that the run has left."""
DIGEST_FILE = "manifest.sha256"
# What files raise that are not what they were: a ValidationError and a JSONDecodeError are ValueErrors.
_WRONG_CONTENT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def write_facts(partial: Path, *, config_text: str, facts: Facts, files: Mapping[str, bytes]) -> None:
    """Write the files that describe a checkpoint beside its tensors; on one rank.

    Args:
        files: content of further ones by name, such as the tokenizer's; a name may lie in a folder.
    """
    (partial / CONFIG_FILE).write_text(config_text, encoding="utf-8")
    (partial / FACTS_FILE).write_text(facts.to_json(), encoding="utf-8")
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)


def copy_small_files(checkpoint: Checkpoint, partial: Path, facts: Facts) -> None:
    """Copy the files that describe a checkpoint beside its tensors to another one, which has its own facts."""
    for name in checkpoint.files:
        if name not in (FACTS_FILE, INDEX_FILE) and not name.endswith(TENSORS_SUFFIX):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(checkpoint.small_file(name))
    (partial / FACTS_FILE).write_text(facts.to_json(), encoding="utf-8")


def publish(partial: Path, final: Path, digests: dict[str, str]) -> None:
    """Complete a partial folder under its final name; on one rank, after all files were written.

    Args:
        digests: SHA-256 of the files for which it is known from writing them, by name; the others are read.

    Raises:
        OSError: a file cannot be written, or one of those in `digests` is not here.
    """
    names = sorted(digests.keys() | {str(f.relative_to(partial)) for f in partial.rglob("*") if f.is_file()})
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": digests.get(name) or sha256_of(partial / name)}
        for name in names
    }
    manifest = json.dumps({"files": files}, indent=1).encode()
    (partial / MANIFEST_FILE).write_bytes(manifest)
    (partial / DIGEST_FILE).write_bytes(hashlib.sha256(manifest).hexdigest().encode())
    if os.path.lexists(final):  # or a link to one that is gone
        set_aside(final)
    partial.rename(final)
    point_latest(final.parent)


def point_latest(checkpoints: Path) -> None:
    """Make `latest` name the newest checkpoint; remove it if there is none."""
    newest = next(iter(candidates(checkpoints)), None)
    if newest is None:
        (checkpoints / LATEST_FILE).unlink(missing_ok=True)
        return
    write_whole(checkpoints / LATEST_FILE, newest.name + "\n")


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint to where no run resumes from it by itself; returns its new path."""
    aside = checkpoint.parent / ASIDE_FOLDER
    aside.mkdir(exist_ok=True)
    target, number = aside / checkpoint.name, 1
    while os.path.lexists(target):
        number += 1
        target = aside / f"{checkpoint.name}.{number}"
    if not checkpoint.is_symlink():
        return checkpoint.rename(target)
    target.symlink_to(checkpoint.resolve())  # from there a relative one would point elsewhere
    checkpoint.unlink()
    return target


def forget_old(checkpoints: Path, *, keep_last: int, keep_every_steps: int | None) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those of every n-th step; returns what was deleted.

    Of one that was moved away, with a link in its place, the link alone is.
    """
    old = candidates(checkpoints)[keep_last:]
    deleted = [p for p in old if keep_every_steps is None or int(p.name.removeprefix("step-")) % keep_every_steps]
    for path in deleted:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    return deleted


def read_manifest(folder: Path) -> bytes:
    """The manifest of a checkpoint, after a check of itself and of the size of every file.

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
    try:
        sizes = {name: int(facts["bytes"]) for name, facts in _files_of(manifest).items()}
    except _WRONG_CONTENT as error:
        raise UserError(
            f"checkpoint {folder} is damaged: {MANIFEST_FILE} holds no files ({error}); use another"
        ) from None
    for name, size in sizes.items():
        file = folder / name
        found = f"has {file.stat().st_size} bytes" if file.exists() else "is missing"
        if found != f"has {size} bytes":
            raise UserError(f"checkpoint {folder} is damaged: {name} {found}, not {size} bytes; use another")
    return manifest


def _files_of(manifest: bytes) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, by name."""
    files: dict[str, dict[str, Any]] = json.loads(manifest)["files"]
    return files


@dataclass(frozen=True)
class Description:
    """The files that every reader of a checkpoint needs."""

    folder: Path
    manifest: bytes
    config: bytes
    facts: bytes
    index: bytes


def _folder_of(path: str | Path) -> Path:
    """The folder of a checkpoint, for a run's folder that of its newest; raises `UserError` if it is neither."""
    folder = local_path(path)
    if any((folder / name).exists() for name in (FACTS_FILE, MANIFEST_FILE)):
        return folder
    found = candidates(RunFolder(folder).checkpoints)
    if not found:
        raise UserError(
            f"{folder} is neither a checkpoint (it has no {FACTS_FILE}) nor the folder of a run that saved one"
        )
    return found[0]


class Checkpoint:
    """A finished checkpoint. Nothing of it is handed out before it was compared with the manifest.

    Args:
        path: the checkpoint's folder, or that of its run, which stands for the run's newest checkpoint.
        verify: compare the tensors now, too, and not only as they are read.
        description: that of the same checkpoint as another process has opened it: nothing is looked at here.

    Raises:
        UserError: nothing complete is there, or it is damaged; this names the file.
    """

    def __init__(self, path: str | Path, *, verify: bool = False, description: Description | None = None) -> None:
        self.folder = folder = description.folder if description else _folder_of(path)
        manifest = description.manifest if description else read_manifest(folder)
        self.files = _files_of(manifest)
        self._tensors_are_whole = False
        try:
            if description is None:
                content = {name: self.small_file(name) for name in self.files if not name.endswith(TENSORS_SUFFIX)}
                needed = (content[name] for name in (CONFIG_FILE, FACTS_FILE, INDEX_FILE))
                description = Description(folder, manifest, *needed)
            self.description = description
            facts = json.loads(description.facts)
            if not OLDEST_FORMAT <= (written := int(facts["format"])) <= FORMAT:
                age, way_out = ("newer", "update skvr_dist") if written > FORMAT else ("older", "use its own release")
                raise UserError(
                    f"checkpoint {folder} has format {written}, {age} than this release's {FORMAT}; {way_out}"
                )
            self.facts = Facts.model_validate(facts)
            self.config = StoredConfig.model_validate(yaml.safe_load(description.config.decode()))
            self.model_config = self.config.model
            self.index = Index(folder, description.index)
        except UserError:
            raise
        except OSError as error:
            raise UserError(self._unreadable(error)) from None
        except (*_WRONG_CONTENT, yaml.YAMLError) as error:
            reason = in_words(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
            raise UserError(f"checkpoint {folder} is damaged ({reason}); use another") from None
        if verify:
            damaged = [name for name, facts in self.files.items() if sha256_of(folder / name) != facts["sha256"]]
            if damaged:
                raise UserError(self._damage(damaged))
            self._tensors_are_whole = True

    def read(
        self,
        pieces: Pieces,
        group: HostGroup,
        neighbours: dist.ProcessGroup | None = None,
        *,
        besides: Collection[str] | None = (),
    ) -> None:
        """Fill pieces, whatever layout they were written by; collective over `group`.

        All tensors are compared with their digests: those that any rank reads by the ranks that read
        them, the others by the ranks in turn.

        Args:
            neighbours: as in `Index.read_pieces`.
            besides: tensors that this rank reads in further calls, and which are compared there; None in these calls,
                which compare nothing but what they read.

        Raises:
            UserError: on all ranks: a tensor is missing or has another shape, or a file is damaged.
        """
        parts = []
        if besides is not None:
            parts = self._comparisons(self._wanted_anywhere({*pieces, *besides}, group))

        def compare_my_share() -> None:
            for compare in parts[group.rank :: group.size]:
                compare()

        self.index.read_pieces(pieces, group, neighbours, before=compare_my_share)

    def _wanted_anywhere(self, here: Collection[str], group: HostGroup) -> set[str]:
        """The tensors of this checkpoint that any rank wants; collective.

        Args:
            here: those that this one does.
        """
        names = self.index.names()
        wanted = group.sum([float(name in here) for name in names])
        return {name for name, ranks in zip(names, wanted, strict=True) if ranks}

    def _comparisons(self, wanted: set[str]) -> list[Callable[[], object]]:
        """Calls that compare everything but the tensors in `wanted`, which are compared as they are read."""
        if self.index.has_digests:
            return [functools.partial(self.index.verify, name) for name in self.index.names() if name not in wanted]
        return [functools.partial(self._compare, name) for name in self.files if name.endswith(TENSORS_SUFFIX)]

    def small_file(self, name: str) -> bytes:
        """Content of a file that is not of tensors, compared with the manifest.

        Raises:
            UserError: it changed since it was written.
            OSError: it cannot be read.
        """
        content = (self.folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != self.files[name]["sha256"]:
            raise UserError(self._damage([name]))
        return content

    def _compare(self, name: str) -> None:
        """Compare a whole file of tensors with the manifest."""
        if sha256_of(self.folder / name) != self.files[name]["sha256"]:
            raise UserError(self._damage([name]))

    def _unreadable(self, error: OSError) -> str:
        return f"checkpoint {self.folder} could not be read ({error.strerror}: {error.filename}); use another"

    def _damage(self, names: Iterable[str]) -> str:
        return f"checkpoint {self.folder} is damaged: {', '.join(names)} changed since it was written; use another"

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.facts.step

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokenizer that was imported with the weights, or that of the training data; None without one."""
        names = [name for name in (IMPORTED_TOKENIZER_FILE, TOKENIZER_FILE) if name in self.files]
        return self.folder / names[0] if names else None

    @property
    def is_trained(self) -> bool:
        """Whether a run of ours wrote it; otherwise it is an import."""
        return self.facts.data_fingerprint is not None

    @property
    def has_moments(self) -> bool:
        """Whether training can resume from it: a checkpoint of weights alone can only start a run.

        A run all of whose updates were skipped may have none yet, and knows that.
        """
        return self.facts.adam_steps == 0 or any(not name.startswith(WEIGHTS) for name in self.index.names())

    def weight_names(self) -> list[str]:
        """Canonical names of all weights."""
        return [name.removeprefix(WEIGHTS) for name in self.index.names() if name.startswith(WEIGHTS)]

    def weight(self, name: str) -> Tensor:
        """One whole weight, on the host, in the precision it was trained in.

        Raises:
            UserError: there is none, or a file is damaged.
        """
        return self.stored_weight(name).to(self.weight_dtype(name))

    def stored_weight(self, name: str) -> Tensor:
        """One whole weight, on the host, as it is stored: the fp32 master, where training kept one.

        The first call also compares the tensors that are not weights, so that reading all weights checks the whole
        checkpoint.

        Raises:
            UserError: there is none, or a file is damaged.
        """
        if not self._tensors_are_whole:
            try:
                for compare in self._comparisons({known for known in self.index.names() if known.startswith(WEIGHTS)}):
                    compare()
            except OSError as error:
                raise UserError(self._unreadable(error)) from None
            self._tensors_are_whole = True
        return self.index.read(WEIGHTS + name)

    def weight_dtype(self, name: str) -> torch.dtype:
        """The precision that a weight was trained in; its file may hold the fp32 master."""
        return torch.bfloat16 if self.config.train.precision == "bf16" else self.index.dtype(WEIGHTS + name)

    @torch.no_grad()
    def load_decoder(self) -> Decoder:
        """The whole trained decoder, in float32 on the CPU, for evaluation."""
        model = self.model_config
        if model.attention in ("flash", "routed", *FLASH_KERNELS):  # of the GPUs that it was trained on
            model = model.model_copy(update={"attention": "auto"})
        with torch.device("meta"):  # no initial weights are drawn
            decoder = Decoder(model)
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
