"""Import of a checkpoint of Hugging Face: a checkpoint of ours at step 0, to train further from.

Weights are copied tensor by tensor in their stored dtype, those of a GGUF file dequantized to float32; one at a time is
in memory.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig

from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import Checkpoint, partial_folder, publish, step_folder, write_facts
from skvr_dist.checkpoint.pieces import WEIGHTS, LazyPiece, Pieces
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, prove_new_folder, published
from skvr_dist.hf.convert.check import CheckReport, check_export
from skvr_dist.hf.convert.gguf_file import GGUFFile
from skvr_dist.hf.convert.model_config import hf_config, model_config
from skvr_dist.hf.convert.tokenizer import TOKENIZER_FILES, copy_tokenizer
from skvr_dist.hf.convert.weights import check_names, hf_name, parameter_shapes
from skvr_dist.run.folder import RunFolder

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class ImportReport:
    """An import and the figures of its check."""

    architecture: str
    parameters: int
    bytes: int
    """Size of the weight files."""
    dtypes: tuple[str, ...]
    """Dtypes of the stored weights."""
    dequantized_from: str | None
    """Quantization types of the source, as GGUF names them; None if it holds plain values."""
    tokenizer: str
    """Where the tokenizer came from, in words."""
    check: CheckReport | None
    """None if the check was left out."""

    def failures(self) -> list[str]:
        """One sentence per figure that was missed."""
        return self.check.failures() if self.check else []

    def figures(self) -> dict[str, Any]:
        """Everything as plain values."""
        difference = self.check.relative_logit_difference if self.check else None
        return {**asdict(self), "relative_logit_difference": difference, "failures": self.failures()}


class ImportMismatchError(Exception):
    """Our decoder does not compute what transformers does; nothing was written. `report` has the figures."""

    def __init__(self, report: ImportReport) -> None:
        super().__init__(f"the import does not match its source: {'; '.join(report.failures())}")
        self.report = report


def import_model(source: str, output: Path, *, check: bool = True) -> ImportReport:
    """Write `output/checkpoints/step-00000000`, which `Checkpoint(output)` opens.

    It is written and checked in a temporary folder beside `output`, and renamed at the end.

    Args:
        source: a local folder, the name of a repository of the Hub, or a local GGUF file.
        output: the folder to make; it may exist if it is empty.
        check: compare the result with its source; this alone holds a whole model in memory, in float32.

    Raises:
        UserError: `output` holds something or cannot be written; the source is missing, damaged, of another
            architecture, or lacks weights, or has others or of another shape.
        ImportMismatchError: our decoder computes other logits than transformers.
    """
    output = prove_new_folder(output)
    original: _Original
    if source.endswith(".gguf") and not local_path(source).is_dir():
        gguf = GGUFFile(local_path(source))
        original, config, dequantized_from = gguf, gguf.config, gguf.quantization
        folder, way_out = gguf.file.parent, f"download {source} again or give another file"
        loading = {"gguf_file": gguf.file.name, "config": hf_config(config, torch.float32, {})}
    else:
        folder, dequantized_from, loading = _local_folder(source), None, {}
        config, way_out = _published_config(folder), f"download {folder} again or give another checkpoint"
        original = _Folder(folder, tied=config.tie_word_embeddings)
    shapes = parameter_shapes(hf_config(config, torch.float32, {}))
    check_names(original.names(), shapes, config.architecture, way_out)
    dtypes = {name: _trainable_dtype(name, *original.shape_and_dtype(name), shape) for name, shape in shapes.items()}

    with published(output) as run:
        partial = RunFolder(run).checkpoints / partial_folder(0)
        partial.mkdir(parents=True)
        digests = _write(partial, shapes, dtypes, original)
        tokenizer = original.write_tokenizer(partial)
        tree = {"model": config.model_dump(), "routing": {"policy": "none"}}
        facts = Facts(step=0, tokens_seen=0, imported_from=source, dequantized_from=dequantized_from or None)
        write_facts(partial, config_text=yaml.safe_dump(tree, sort_keys=False), facts=facts, tokenizer=None)
        final = RunFolder(run).checkpoints / step_folder(0)
        publish(partial, final, digests)
        report = ImportReport(
            architecture=config.architecture,
            parameters=sum(shape.numel() for shape in shapes.values()),
            bytes=sum(file.stat().st_size for file in final.glob("*.distcp")),
            dtypes=tuple(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})),
            dequantized_from=dequantized_from,
            tokenizer=tokenizer,
            check=check_export(folder, config, Checkpoint(final).weight, None, None, loading=loading)
            if check
            else None,
        )
        if report.failures():
            raise ImportMismatchError(report)
    return report


class _Original(Protocol):
    """The source of an import, by canonical names."""

    def names(self) -> list[str]:
        """Names of its weights; in brackets those that have no canonical name, which `check_names` refuses."""

    def shape_and_dtype(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the weight that `read` returns."""

    def read(self, name: str) -> Tensor:
        """One whole weight."""

    def write_tokenizer(self, folder: Path) -> str:
        """Write the files of its tokenizer; returns where they came from, in words."""


def _local_folder(source: str) -> Path:
    if (folder := local_path(source)).is_dir():
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} is neither a folder here nor a repository of the Hub ({reason})") from None


def _published_config(folder: Path) -> ModelConfig:
    try:
        published = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files and not (folder / "config.json").exists():
            raise UserError(f"{folder} holds GGUF files; name the one to import, such as {folder / files[0]}") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {folder}/config.json ({reason}); give the folder of a checkpoint") from None
    return model_config(published)


class _Folder:
    """The safetensors and the tokenizer of a checkpoint of Hugging Face, each weight read when it is asked for."""

    def __init__(self, folder: Path, tied: bool) -> None:
        self._folder = folder
        self._file_of: dict[str, Path] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from None
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no safetensors files; convert the checkpoint with save_pretrained first")
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    self._file_of.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"weights {file} are missing or damaged ({error}); download them again") from None
        # Old Llama checkpoints store the rotary frequencies, which follow from the configuration.
        self._file_of = {name: f for name, f in self._file_of.items() if not name.endswith("rotary_emb.inv_freq")}
        if tied and _HEAD in self._file_of and hf_name(_EMBEDDING) in self._file_of:
            if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
                raise UserError(
                    f"{folder} says tie_word_embeddings true, but its {_HEAD} is not its embedding; set it to false in "
                    f"config.json"
                )
            del self._file_of[_HEAD]

    def names(self) -> list[str]:
        canonical = {name: name.removeprefix("model.") for name in self._file_of}
        return [ours if hf_name(ours) == name else f"({name})" for name, ours in canonical.items()]

    def shape_and_dtype(self, name: str) -> tuple[list[int], torch.dtype]:
        stored = hf_name(name)
        with safe_open(self._file_of[stored], framework="pt") as opened:
            tensor = opened.get_slice(stored)
            return tensor.get_shape(), tensor[:0].dtype

    def read(self, name: str) -> Tensor:
        stored = hf_name(name)
        with safe_open(self._file_of[stored], framework="pt") as opened:
            return opened.get_tensor(stored)

    def write_tokenizer(self, folder: Path) -> str:
        copied = copy_tokenizer(self._folder, folder)
        return f"{', '.join(copied)}, as they are" if copied else "none"


def _write(
    folder: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype], original: _Original
) -> dict[str, str]:
    """Write the weights in the format that `Checkpoint` reads, one in memory at a time; returns the files' digests."""
    with tqdm(total=len(shapes), desc="importing weights", unit="tensor", disable=None) as progress:

        def read(name: str) -> Tensor:
            progress.update()
            return original.read(name)

        pieces: Pieces = {}
        for name, shape in shapes.items():
            like = torch.empty(shape, dtype=dtypes[name], device="meta")
            pieces[WEIGHTS + name] = [LazyPiece(tuple(shape), (0,) * len(shape), like, functools.partial(read, name))]
        return write_pieces(folder, pieces, alone=True)


def _trainable_dtype(name: str, shape: list[int], dtype: torch.dtype, wanted: torch.Size) -> torch.dtype:
    """The dtype, if a weight can be trained as it is stored."""
    if tuple(shape) != wanted:
        raise UserError(
            f"weight {hf_name(name)} has shape {shape}, but config.json makes it {list(wanted)}; use the "
            f"config.json that belongs to the weights"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"weight {hf_name(name)} is stored as {dtype}, which cannot be trained; import the original in bf16 or fp32"
        )
    return dtype
