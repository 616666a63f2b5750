"""The files that a model from elsewhere brought along, copied from its folder: tokenizer, templates, generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from skvr_dist.checkpoint.brought import GENERATION_FILE, TEMPLATES_FOLDER, TOKENIZER_FILES
from skvr_dist.checkpoint.folder import IMPORTED_TOKENIZER_FILE
from skvr_dist.errors import UserError

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_brought(source: Path, target: Path) -> list[str]:
    """Copy somebody else's tokenizer and settings of generation as they are; returns the names of the files.

    Raises:
        UserError: one of them is damaged.
    """
    templates = [f"{TEMPLATES_FOLDER}/{file.name}" for file in sorted((source / TEMPLATES_FOLDER).glob("*.jinja"))]
    found = [name for name in (*TOKENIZER_FILES, *templates, GENERATION_FILE) if (source / name).is_file()]
    for name in found:
        _require_whole(source / name)
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def _require_whole(file: Path) -> None:
    """Raises `UserError` if a file of JSON holds none, or a tokenizer.json no tokenizer."""
    if file.suffix != ".json":
        return
    try:
        if not isinstance(json.loads(file.read_bytes().decode()), dict):
            raise ValueError("it holds no JSON object")
        if file.name == IMPORTED_TOKENIZER_FILE:
            FastTokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {file} ({reason}); download it again, or remove it to do without") from None


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of the files in a folder.

    Raises:
        UserError: it cannot.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any type, for what is wrong with any of its files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"transformers cannot load the tokenizer in {folder} ({type(error).__name__}: {reason}); correct its "
            f"files, or do without it"
        ) from None
    return tokenizer


def add_fast_tokenizer(source: Path, target: Path) -> str:
    """Write the tokenizer.json that transformers makes of a tokenizer's other files; says how it went."""
    try:
        open_tokenizer(source).backend_tokenizer.save(str(target / IMPORTED_TOKENIZER_FILE))
    except (UserError, AttributeError) as error:  # one that is Python code has no backend
        return f"without {IMPORTED_TOKENIZER_FILE}, which data is prepared with: {error}"
    return f"and {IMPORTED_TOKENIZER_FILE}, made of them by transformers"


def named_ids(config: PreTrainedConfig) -> dict[str, Any]:
    """The special tokens that a config.json names, by field; several where a model has several ends."""
    ids = {name: getattr(config, name, None) for name in SPECIAL_IDS}
    return {name: value for name, value in ids.items() if value is not None}


def write_generation(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write the settings of generation that transformers takes from a config.json where they have no file of their own.

    Args:
        tree: the content of config.json; those of older models have a temperature and the like.

    Raises:
        UserError: transformers refuses them.
    """
    try:
        settings = GenerationConfig.from_model_config(dict(tree))
        settings._from_model_config = False  # else transformers would take them from config.json again
        settings.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config.json has settings of generation that cannot be ({reason}); correct them") from None
