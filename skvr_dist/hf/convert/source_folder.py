"""A checkpoint of Hugging Face in a folder, as the source of an import: its configuration, weights and tokenizer."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from skvr_dist.checkpoint.brought import GENERATION_FILE
from skvr_dist.checkpoint.folder import IMPORTED_TOKENIZER_FILE
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.brought_files import add_fast_tokenizer, copy_brought, named_ids, write_generation
from skvr_dist.hf.convert.model_config import model_config, require_family
from skvr_dist.hf.convert.weight_files import names_in_file, require_no_adapter, weight_files
from skvr_dist.hf.convert.weights import hf_name

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class SourceFolder:
    """A folder with config.json, safetensors files and perhaps a tokenizer; each weight is read when it is asked for.

    Raises:
        UserError: it is no checkpoint that can be imported; the sentence names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require_no_adapter(folder)
        self._tree = _config_tree(folder)
        self.published = _published_config(folder, self._tree)
        self.config = model_config(self.published)
        named = self._tree.get("transformers_weights")
        self._place: dict[str, tuple[Path, str]] = {}  # file and name there, by canonical name
        for file in weight_files(folder, named if isinstance(named, str) else None):
            for stored in names_in_file(file):
                # Old Llama checkpoints store the rotary frequencies, which follow from the configuration.
                if not stored.endswith("rotary_emb.inv_freq"):
                    self._place[_canonical(stored)] = (file, stored)
        if self.config.tie_word_embeddings and _HEAD in self._place:
            self._tie()

    def _tie(self) -> None:
        """Drop a head that is stored beside the embedding it is tied to; take it for the embedding if that is not."""
        if _EMBEDDING not in self._place:
            self._place[_EMBEDDING] = self._place[_HEAD]
        elif not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise UserError(
                f"{self.folder} says tie_word_embeddings true, but its {_HEAD} is not its embedding; set it to false "
                f"in config.json"
            )
        del self._place[_HEAD]

    @property
    def special_ids(self) -> dict[str, Any]:
        """The special tokens that its config.json names."""
        return named_ids(self.published)

    @property
    def way_out(self) -> str:
        """What to do about weights that are not those of the model."""
        if not self.config.tie_word_embeddings and _HEAD not in self._place and _EMBEDDING in self._place:
            return "set tie_word_embeddings to true in config.json if its embedding is its output head"
        return f"download {self.folder} again or give another checkpoint"

    def names(self) -> list[str]:
        """Names of its weights; in brackets those that have no canonical name, which `check_names` refuses."""
        return list(self._place)

    def shape_and_dtype(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the weight that `read` returns."""
        file, stored = self._place[name]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_slice(stored)
            return tensor.get_shape(), tensor[:0].dtype

    def read(self, name: str) -> Tensor:
        """One whole weight."""
        file, stored = self._place[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(stored)

    def write_tokenizer(self, folder: Path) -> str:
        """Copy the files of its tokenizer and its settings of generation; returns their names."""
        copied = copy_brought(self.folder, folder)
        if GENERATION_FILE not in copied:
            write_generation(folder, self._tree)
        if copied in ([], [GENERATION_FILE]):
            return f"none; {GENERATION_FILE} as it is" if copied else "none"
        said = f"{', '.join(copied)}, as they are"
        is_slow = IMPORTED_TOKENIZER_FILE not in copied
        return f"{said}, {add_fast_tokenizer(self.folder, folder)}" if is_slow else said


def _canonical(stored: str) -> str:
    name = stored.removeprefix("model.")
    return name if hf_name(name) == stored else f"({stored})"


def _config_tree(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        content = file.read_bytes()
        if content.startswith(codecs.BOM_UTF8):
            raise ValueError("it begins with a byte-order mark, which transformers does not take")
        tree = json.loads(content.decode())
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}, not an object")
        if not isinstance(tree.get("model_type"), str):
            raise ValueError("it names no model_type")
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); {_place_meant(folder)}") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {file} ({reason}); correct it or download it again") from None
    return tree


def _place_meant(folder: Path) -> str:
    """The folder or file to give instead of one that holds no config.json."""
    if gguf := sorted(folder.glob("*.gguf")):
        return f"the folder holds GGUF files; name the one to import, such as {gguf[0]}"
    if snapshots := sorted(folder.glob("snapshots/*/config.json")):
        return f"the folder is one of the Hub's cache; give {snapshots[-1].parent}"
    return "give the folder of a checkpoint"


def _published_config(folder: Path, tree: dict[str, Any]) -> PreTrainedConfig:
    """The configuration as transformers reads it, but for the dtype, which the weights say themselves.

    Raises:
        UserError: it is of no family of ours, quantized, or transformers refuses it.
    """
    require_family(tree["model_type"])
    if tree.get("quantization_config") is not None:
        raise UserError("the checkpoint is quantized and cannot be trained; import the original in bf16 or fp32")
    fields = {name: value for name, value in tree.items() if name not in ("dtype", "torch_dtype")}
    try:
        published: PreTrainedConfig = CONFIG_MAPPING[tree["model_type"]].from_dict(fields)
        return published
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {folder}/config.json ({reason}); correct it or download it again") from None
