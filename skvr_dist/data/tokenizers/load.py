"""Reading a tokenizer, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.data.tokenizers.hugging_face import HuggingFaceTokenizer, read_hf_files
from skvr_dist.data.tokenizers.sentencepiece import SentencePieceTokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import local_path, require_file


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file of ours, a sentencepiece `.model`, or a Hugging Face `tokenizer.json` or its folder.

    Raises:
        UserError: none of these is there, or one that cannot be used.
    """
    path = local_path(path)
    try:
        if path.is_dir() or path.suffix == ".json":
            return tokenizer_from_bytes(read_hf_files(path), str(path))
        require_file(path)
        return tokenizer_from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        missing = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise UserError(
            f"cannot read tokenizer {path}: {error.strerror}{missing}; train one with tools/train_tokenizer.py"
        ) from None


def tokenizer_from_bytes(model: bytes, name: str = "tokenizer") -> Tokenizer:
    """The tokenizer in the content of its file (`Tokenizer.model`); `name` is where it came from, for messages."""
    return HuggingFaceTokenizer(model, name) if model[:1] == b"{" else SentencePieceTokenizer(model, name)
