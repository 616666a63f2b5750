"""Which files of a folder hold a model's weights: those that transformers loads, whatever else lies beside them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from skvr_dist.errors import UserError
from skvr_dist.files import require_file

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
_CONSOLIDATED = "consolidated*.safetensors"
"""Weights under the names of their first publisher, which transformers does not look at."""
_LFS_POINTER = b"version https://git-lfs"


def weight_files(folder: Path, named: str | None = None) -> list[Path]:
    """The safetensors files that transformers loads from a folder.

    The single file comes before an index, which may be left from an earlier save; files that neither names are not
    looked at.

    Args:
        named: what config.json says under `transformers_weights`, if anything; it comes first.

    Raises:
        UserError: there are none, or the index is damaged or names none.
    """
    first = named or SINGLE_FILE
    if first.endswith(".index.json"):
        return [folder / name for name in names_in_index(folder / first)]
    if named or (folder / first).is_file():
        return [folder / first]
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in names_in_index(folder / INDEX_FILE)]
    if os.path.lexists(folder / first):  # a dangling link, a pipe: `names_in_file` says so
        return [folder / first]
    others = sorted(file.name for pattern in ("*.safetensors", "*.bin", "*.pth") for file in folder.glob(pattern))
    safe = [name for name in others if name.endswith(".safetensors")]
    if not safe:
        found = f" but {others[0]}" if others else ""
        raise UserError(
            f"{folder} holds no safetensors files{found}; convert the checkpoint with save_pretrained first"
        )
    raise UserError(
        f"{folder} holds neither {first} nor {INDEX_FILE}, but {safe[0]}, which transformers does not load; rename it "
        f"if it is the whole model, or download the folder again"
    )


def names_in_index(index: Path) -> list[str]:
    """The names of the files that an index of weights names, in order.

    Raises:
        UserError: the index is damaged or names none.
    """
    try:
        tree = json.loads(index.read_bytes().decode())
        files = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ValueError("it has no weight_map of names of files")
        if not files:
            raise ValueError("its weight_map names no file")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from None
    return sorted(set(files.values()))


def names_in_file(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file.

    Raises:
        UserError: it is missing, no regular file, or damaged.
    """
    try:
        require_file(file)
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = "it is a pointer of Git LFS" if _is_pointer(file) else reason
        raise UserError(f"weights {file} are missing or damaged ({reason}); download them again") from None


def require_no_adapter(folder: Path) -> None:
    """Raises `UserError` if a folder holds a PEFT adapter, which transformers puts onto weights as it loads them."""
    if (folder / ADAPTER_FILE).exists():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which changes a model's weights as they are loaded; merge it "
            f"with merge_and_unload and save the whole model first"
        )


def require_same_for_vllm(folder: Path) -> None:
    """Refuse a folder from which vLLM, which prefers consolidated files and an index, takes others than transformers.

    Raises:
        UserError: names the files of both.
    """
    consolidated = sorted(file.name for file in folder.glob(_CONSOLIDATED))
    single = (folder / SINGLE_FILE).is_file()
    indexed = names_in_index(folder / INDEX_FILE) if single and (folder / INDEX_FILE).is_file() else [SINGLE_FILE]
    others = consolidated or [name for name in indexed if name != SINGLE_FILE]
    if others:
        kept = SINGLE_FILE if single else INDEX_FILE
        raise UserError(
            f"{folder} holds two sets of weights: vLLM would load {others[0]}, transformers {kept}; remove "
            f"{others[0] if consolidated else INDEX_FILE} if it is the older one, or keep the other set alone"
        )


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False
