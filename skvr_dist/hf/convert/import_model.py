"""Import of a checkpoint of Hugging Face: a checkpoint of ours at step 0, to train further from.

Weights are copied tensor by tensor in their stored dtype, those of a GGUF file dequantized to float32; one at a time is
in memory.
"""

from __future__ import annotations

import functools
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
)
from torch import Tensor
from tqdm import tqdm

from skvr_dist.checkpoint.brought import TEMPLATES_FOLDER, TOKENIZER_FILES
from skvr_dist.checkpoint.facts import Facts
from skvr_dist.checkpoint.folder import Checkpoint, partial_folder, publish, step_folder, write_facts
from skvr_dist.checkpoint.pieces import WEIGHTS, LazyPiece, Pieces
from skvr_dist.checkpoint.storage import write_pieces
from skvr_dist.config.model import ModelConfig
from skvr_dist.errors import UserError
from skvr_dist.files import prove_new_folder, published
from skvr_dist.hf.convert.check import CheckReport, LoadError, check_export
from skvr_dist.hf.convert.gguf_file import GGUFFile
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.hf.convert.source_folder import SourceFolder
from skvr_dist.hf.convert.weights import check_names, hf_name, parameter_shapes
from skvr_dist.run.folder import RunFolder


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
    here = _path_here(source)
    if source.endswith(".gguf") and (here is None or not here.is_dir()):
        gguf = GGUFFile(here or Path(source))
        original, config, dequantized_from = gguf, gguf.config, gguf.quantization
        folder, way_out = gguf.file.parent, f"download {source} again or give another file"
        loading = {"gguf_file": gguf.file.name, "config": hf_config(config, torch.float32, {})}
    else:
        stored = SourceFolder(_local_folder(source))
        original, config, dequantized_from = stored, stored.config, None
        folder, way_out, loading = stored.folder, stored.way_out, {"config": stored.published}
    shapes = parameter_shapes(hf_config(config, torch.float32, {}))
    check_names(original.names(), shapes, config.architecture, way_out)
    dtypes = {name: _trainable_dtype(name, *original.shape_and_dtype(name), shape) for name, shape in shapes.items()}

    with published(output) as run:
        partial = RunFolder(run).checkpoints / partial_folder(0)
        partial.mkdir(parents=True)
        digests = _write(partial, shapes, dtypes, original)
        tokenizer = original.write_tokenizer(partial)
        tree = {"model": config.model_dump(), "routing": {"policy": "none"}}
        facts = Facts(
            step=0,
            tokens_seen=0,
            imported_from=source,
            dequantized_from=dequantized_from or None,
            special_ids=original.special_ids or None,
        )
        write_facts(partial, config_text=yaml.safe_dump(tree, sort_keys=False), facts=facts, files={})
        final = RunFolder(run).checkpoints / step_folder(0)
        publish(partial, final, digests)
        report = ImportReport(
            architecture=config.architecture,
            parameters=sum(shape.numel() for shape in shapes.values()),
            bytes=sum(file.stat().st_size for file in final.glob("*.distcp")),
            dtypes=tuple(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})),
            dequantized_from=dequantized_from,
            tokenizer=tokenizer,
            check=_compare(folder, config, Checkpoint(final), loading) if check else None,
        )
        if report.failures():
            raise ImportMismatchError(report)
    return report


def _compare(folder: Path, config: ModelConfig, checkpoint: Checkpoint, loading: dict[str, Any]) -> CheckReport:
    """Compare an import with its source; raises `UserError` if transformers cannot load that."""
    try:
        return check_export(folder, config, checkpoint.weight, None, None, loading=loading)
    except LoadError as error:
        raise UserError(f"{' '.join(str(error).split())}; correct it or download it again") from None


class _Original(Protocol):
    """The source of an import, by canonical names."""

    @property
    def special_ids(self) -> dict[str, Any]:
        """The special tokens that its configuration names, apart from the tokenizer's."""

    def names(self) -> list[str]:
        """Names of its weights; in brackets those that have no canonical name, which `check_names` refuses."""

    def shape_and_dtype(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the weight that `read` returns."""

    def read(self, name: str) -> Tensor:
        """One whole weight."""

    def write_tokenizer(self, folder: Path) -> str:
        """Write the files of its tokenizer; returns where they came from, in words."""


def _path_here(source: str) -> Path | None:
    """The path of a file or folder of this machine; None for what is none, such as a name that is too long for one."""
    try:
        path = Path(source).expanduser()
        return path if source and path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _local_folder(source: str) -> Path:
    """The folder of a source; a repository of the Hub is downloaded.

    Raises:
        UserError: it is neither.
    """
    here = _path_here(source)
    if here is not None and here.is_dir():
        return here
    if here is not None:
        raise UserError(f"{source} is a file, but no GGUF file; give the folder it is in")
    wanted = ["*.safetensors", "*.json", f"{TEMPLATES_FOLDER}/*", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["consolidated*", "original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} is neither a folder here nor a repository of the Hub ({reason})") from None


def _write(
    folder: Path, shapes: dict[str, torch.Size], dtypes: dict[str, torch.dtype], original: _Original
) -> dict[str, str]:
    """Write the weights in the format that `Checkpoint` reads, one in memory at a time; returns the files' digests."""
    with tqdm(total=len(shapes), desc="importing weights", unit="tensor", disable=None) as progress:

        def read(name: str) -> Tensor:
            progress.update()
            return _finite(name, original.read(name))

        pieces: Pieces = {}
        for name, shape in shapes.items():
            like = torch.empty(shape, dtype=dtypes[name], device="meta")
            pieces[WEIGHTS + name] = [LazyPiece(tuple(shape), (0,) * len(shape), like, functools.partial(read, name))]
        return write_pieces(folder, pieces)


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The weight; raises `UserError` if it holds what nothing can be trained from."""
    odd = tensor.numel() - int(tensor.isfinite().sum())
    if odd:
        raise UserError(
            f"weight {hf_name(name)} holds {odd} NaN or infinite values among {tensor.numel()}; import a checkpoint "
            f"without"
        )
    return tensor


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
