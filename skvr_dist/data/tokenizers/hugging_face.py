"""Hugging Face tokenizers in the data path.

Their two files become one: a JSON object with `eos_token`, `tokenizer`, the content of tokenizer.json, and `pad_token`
if it names one. Only the `tokenizers` package is needed to read it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

from skvr_dist.data.tokenizers.base import Tokenizer
from skvr_dist.errors import UserError
from skvr_dist.files import require_file

_IDENTITY = ("eos_token", "tokenizer")


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer. Whether texts come back exactly is up to it: byte-level BPE without a normalizer does that.

    Args:
        model: what `read_hf_files` returns.
        name: where it came from, for messages.

    Raises:
        UserError: the content is not a tokenizer, or its end-of-sequence token is not in the vocabulary.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        self.model = model
        try:
            content = json.loads(model)
            self.eos_token = str(content["eos_token"])
            self._identity = model if "pad_token" not in content else _dump({k: content[k] for k in _IDENTITY})
            stateless = _without_training_settings(content["tokenizer"])
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stateless))
            eos_id = self._tokenizer.token_to_id(self.eos_token)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{name} is not a Hugging Face tokenizer ({' '.join(str(error).split())})") from None
        if eos_id is None:
            raise UserError(f"{name} has no token {self.eos_token!r}, which its configuration names as the eos_token")
        self._eos_id = eos_id
        pad: Any = content.get("pad_token")
        self.pad_token = pad if isinstance(pad, str) and self._tokenizer.token_to_id(pad) is not None else None
        """The token that fills sequences up to one length, if it has one."""
        self._name = name
        self._tokenizer.encode_special_tokens = True  # names of special tokens in a text are just text
        self._tell_names_from_tokens()

    def _tell_names_from_tokens(self) -> None:
        """Have the name of a special token in a text not become the token: it would end a document in its middle.

        The end-of-sequence token may not be called special in the file. And models of whole pieces or words, unigram
        above all, find a name that is in their vocabulary, so it is divided after its first character.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        eos = added.get(self._eos_id, tokenizers.AddedToken(self.eos_token, special=True, normalized=False))
        if self._eos_id not in added or not eos.special:
            eos.special = True
            self._tokenizer.add_special_tokens([eos])
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        if names := [name for name in special if name[1:] and _finds(self._tokenizer, name)]:
            starts = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
            divide = pre_tokenizers.Split(Regex(starts), "merged_with_previous")
            others = filter(None, [self._tokenizer.pre_tokenizer])
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([divide, *others])

    def for_export(self) -> tokenizers.Tokenizer:
        """A copy that adds no special tokens to a text, as none are added in training."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.post_processor = None
        return copy

    def is_same(self, model: bytes) -> bool:
        try:
            return self.sha256 == HuggingFaceTokenizer(model).sha256
        except UserError:
            return False

    @property
    def sha256(self) -> str:
        """Hash of what decides the tokens of a document; with what it is padded does not."""
        return hashlib.sha256(self._identity).hexdigest()

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # bare too: a word is not in the vocabulary, and there is no token for unknown ones
            raise UserError(f"{self._name} cannot encode a text ({' '.join(str(error).split())})") from None

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text in which names of special tokens are these tokens, as a chat template writes them.

        Returns:
            the ids, and for each the characters that it stands for: from the first to before the second.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # as above
            raise UserError(f"{self._name} cannot encode a text ({' '.join(str(error).split())})") from None
        finally:
            self._tokenizer.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos_id(self) -> int:
        return self._eos_id


def _without_training_settings(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json without dropout, truncation and padding.

    So the tokens of a text depend on nothing but the text. Dropout of BPE merges is a setting of training a model;
    a tokenizer that was saved with it would give other tokens each time.
    """
    model = {key: value for key, value in tokenizer["model"].items() if key not in ("dropout", "alpha", "nbest_size")}
    return {**tokenizer, "truncation": None, "padding": None, "model": model}


def _finds(tokenizer: tokenizers.Tokenizer, name: str) -> bool:
    """Whether the model makes a special token of its name."""
    try:
        return tokenizer.token_to_id(name) in tokenizer.encode(name, add_special_tokens=False).ids
    except Exception:  # bare: it has no token for a part of the name, nor one for what is unknown
        return False


def _read_json(file: Path) -> Any:
    require_file(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _read_config(folder: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the special tokens that older folders name elsewhere."""
    config: dict[str, Any] = _read_json(folder / "tokenizer_config.json")
    older = folder / "special_tokens_map.json"  # which transformers reads where the tokens are not described
    return {**_read_json(older), **config} if "added_tokens_decoder" not in config and older.exists() else config


def read_hf_files(path: Path) -> bytes:
    """A tokenizer.json (or its folder) and the settings beside it, tokenizer_config.json above all, as one file.

    Raises:
        OSError: one of them cannot be read.
        UserError: they are no such files or do not name an end-of-sequence token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    try:
        tokenizer, config = _read_json(file), _read_config(folder)
        eos, pad = (_name_of(config.get(name)) for name in ("eos_token", "pad_token"))
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{path} is not a Hugging Face tokenizer: it or its configuration is no JSON object") from None
    if eos is None:
        raise UserError(f"{folder / 'tokenizer_config.json'} names no eos_token; a document must end with one")
    padding = {} if pad is None else {"pad_token": pad}
    return _dump({"eos_token": eos, "tokenizer": tokenizer, **padding})


def read_chat_template(path: Path) -> tuple[str, dict[str, str]] | None:
    """The chat template beside a tokenizer.json (or in its folder), and the special tokens by the names it may use.

    Returns:
        None if there is no template, as beside the one file that a data set holds, or more than one of which none is
        called `default`.

    Raises:
        UserError: the files cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = _read_config(folder)
        file = folder / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror} ({error.filename})") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{folder / 'tokenizer_config.json'} is no JSON object; mend it") from None
    if isinstance(template, list):  # several by name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    if not isinstance(template, str):
        return None
    named = {name: _name_of(token) for name, token in config.items() if name.endswith("_token")}
    return template, {name: token for name, token in named.items() if token is not None}


def _name_of(token: Any) -> str | None:
    """The text of a special token of a tokenizer_config.json, which may be an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _dump(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "surrogatepass")  # half a pair may be in it, which `HuggingFaceTokenizer` refuses
