"""A GGUF file as the source of an import: its metadata as our model section, its blocks as plain weights.

The configuration is read here rather than by transformers, which passes over keys that change the computation, such
as the scaling of rotary frequencies. Tensors are memory-mapped and dequantized one at a time.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoTokenizer

from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.errors import UserError
from skvr_dist.hf.convert.brought_files import copy_brought
from skvr_dist.hf.convert.model_config import hf_config
from skvr_dist.hf.convert.tokenizer import write_tokenizer
from skvr_dist.hf.convert.weights import hf_name, parameter_shapes
from skvr_dist.model.rope import inverse_frequencies
from skvr_dist.section import in_words

# Keys under the architecture's name that are read, or that say again what the others say.
_CONTEXT, _LAYERS, _HIDDEN, _FEED_FORWARD = "context_length", "block_count", "embedding_length", "feed_forward_length"
_HEADS, _KV_HEADS, _EPSILON = "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"
_KEY_LENGTH, _VALUE_LENGTH, _ROTATED = "attention.key_length", "attention.value_length", "rope.dimension_count"
_THETA, _VOCABULARY = "rope.freq_base", "vocab_size"
_REQUIRED = (_CONTEXT, _LAYERS, _HIDDEN, _FEED_FORWARD, _HEADS, _EPSILON)
_KNOWN = {*_REQUIRED, _KV_HEADS, _KEY_LENGTH, _VALUE_LENGTH, _ROTATED, _THETA, _VOCABULARY}
# llama.cpp's default, for files that name none.
_DEFAULT_THETA = 10000.0
_ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of the divisors of the rotary frequencies: all that a file keeps of Llama 3's scaling."""
_PARTS = "split.count"
"""In each file of a model that was cut into several, of which the first alone has the metadata."""
_FAMILIES = {family.gguf_architecture: family for family in FAMILIES.values() if family.gguf_architecture}
"""Families by the architecture that files name."""
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that store plain values; all others are blocks, which are dequantized to float32."""


class GGUFFile:
    """A model in one GGUF file, of a family that `skvr_dist.config.families` has a GGUF name for.

    Args:
        file: the file; what `transformers` can make of its tokenizer is taken from it, or from the folder around it.

    Raises:
        UserError: the package `gguf` is missing; the file is damaged, a part of a model, or of another architecture, or
            its metadata names a feature that our decoder lacks.
    """

    def __init__(self, file: Path) -> None:
        try:
            import gguf
        except ImportError:
            raise UserError(
                f"{file} needs the package gguf to be read; install it with pip install 'skvr-dist[gguf]'"
            ) from None
        self.file = file
        try:
            reader = gguf.GGUFReader(file)
            self._metadata = dict(reader.fields)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            self.gguf_architecture = self._value("general.architecture")
        except (OSError, ValueError, KeyError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} is not a whole GGUF file ({reason}); download it again") from None
        if (parts := self._value(_PARTS)) and parts > 1:
            raise UserError(
                f"{file} is one of {parts} parts of a model; join them with `llama-gguf-split --merge` of llama.cpp, "
                f"and import what it makes"
            )
        if self.gguf_architecture not in _FAMILIES:
            *others, last = sorted(_FAMILIES)
            raise UserError(
                f"{file} is of architecture {self.gguf_architecture}, but only {', '.join(others)} and {last} can be "
                f"imported (Mistral's files say llama); choose another checkpoint"
            )
        self.family = _FAMILIES[self.gguf_architecture]
        self.config = self._model_config()
        names = gguf.get_tensor_name_map(_architecture(gguf, self.gguf_architecture), self.config.num_hidden_layers)
        self._stored: dict[str, str] = {}
        for name in parameter_shapes(hf_config(self.config, torch.float32, {})):
            module, _, kind = hf_name(name).rpartition(".")
            self._stored[name] = f"{names.get_name(module)}.{kind}"

    @property
    def special_ids(self) -> dict[str, Any]:
        """None of its own: those of its tokenizer."""
        return {}

    @property
    def quantization(self) -> str | None:
        """The types of the blocks it holds, those with the most values first; None if it holds plain values."""
        values: Counter[str] = Counter()
        for tensor in self._tensors.values():
            if tensor.tensor_type.name not in _PLAIN:
                values[tensor.tensor_type.name] += int(tensor.n_elements)
        return ", ".join(kind for kind, _ in values.most_common()) or None

    def names(self) -> list[str]:
        """Canonical names; in brackets those of tensors that have none, which `check_names` refuses."""
        canonical = {stored: name for name, stored in self._stored.items()}
        return [canonical.get(name, f"({name})") for name in self._tensors if name != _ROPE_FACTORS]

    def shape_and_dtype(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of the weight that `read` returns."""
        tensor = self._tensors[self._stored[name]]
        return tensor.shape.tolist()[::-1], _PLAIN.get(tensor.tensor_type.name, torch.float32)

    def read(self, name: str) -> Tensor:
        """A weight as transformers has it: dequantized, with the two halves of a rotation apart."""
        import gguf

        tensor = self._tensors[self._stored[name]]
        kind = tensor.tensor_type.name
        try:
            values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is mapped read-only
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"weight {tensor.name} of {self.file} is stored as {kind}, which cannot be dequantized ({error}); "
                f"choose another file of this model"
            ) from None
        part = name.split(".")[-2]
        if self.family.gguf_pairs_rows and part in ("q_proj", "k_proj"):
            heads = self.config.num_attention_heads if part == "q_proj" else self.config.num_key_value_heads
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(values).to(_PLAIN.get(kind, torch.float32))

    def write_tokenizer(self, folder: Path) -> str:
        """Write its tokenizer and chat template as files of transformers; returns what came along, in words.

        A tokenizer.json beside the file comes first, if it has the same tokens: it also says how texts are split,
        for which the file has no more than a name.
        """
        beside = self.file.parent / "tokenizer.json"
        if beside.exists() and self._has_these_tokens(beside):
            copy_brought(self.file.parent, folder)
            return "the files beside it"
        kind, split = self._value("tokenizer.ggml.model"), self._value("tokenizer.ggml.pre")
        try:
            with tempfile.TemporaryDirectory() as alone:  # else files beside it would be mixed in
                Path(alone, self.file.name).symlink_to(self.file.absolute())
                config = hf_config(self.config, torch.float32, {})
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=self.file.name, config=config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"none, for transformers cannot make one of type {kind} ({' '.join(str(error).split())[:200]})"
        write_tokenizer(folder, tokenizer)
        said = f"made by transformers, {'with its' if tokenizer.chat_template else 'without a'} chat template"
        if kind == "gpt2" and split != "gpt-2" and isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel):
            said += f"; it splits texts as GPT-2 did, the original as {split} does: some texts get other ids"
        return said

    def _has_these_tokens(self, file: Path) -> bool:
        tokens = self._value("tokenizer.ggml.tokens") or []
        try:
            tokenizer = FastTokenizer.from_file(str(file))
        except Exception:  # tokenizers raises bare Exception
            return False
        theirs = [tokenizer.id_to_token(number) for number in range(len(tokens))]
        return bool(tokens) and all(b in (a, None) for a, b in zip(tokens, theirs, strict=True))

    def _value(self, name: str) -> Any:
        field = self._metadata.get(name)
        return None if field is None else field.contents()

    def _model_config(self) -> ModelConfig:
        prefix = f"{self.gguf_architecture}."
        found = {name.removeprefix(prefix): self._value(name) for name in self._metadata if name.startswith(prefix)}
        missing = [prefix + name for name in _REQUIRED if name not in found]
        if missing:
            raise UserError(f"{self.file} does not name {', '.join(missing)}; choose another file of this model")
        heads, hidden = found[_HEADS], found[_HIDDEN]
        head_dim = found.get(_KEY_LENGTH, found.get(_ROTATED, hidden // heads))
        unknown = [
            f"{prefix}{name} {value}"
            for name, value in found.items()
            if (name not in _KNOWN and value not in (0, "", "none"))
            or (name in (_VALUE_LENGTH, _ROTATED) and value != head_dim)
        ]
        if unknown:
            raise UserError(f"{self.file} has {' and '.join(unknown)}, which our decoder has not; choose another model")
        try:
            config = ModelConfig(
                architecture=self.family.name,
                vocab_size=self._tensors["token_embd.weight"].shape.tolist()[-1],
                hidden_size=hidden,
                intermediate_size=found[_FEED_FORWARD],
                num_hidden_layers=found[_LAYERS],
                num_attention_heads=heads,
                num_key_value_heads=found.get(_KV_HEADS, heads),
                head_dim=head_dim,
                max_position_embeddings=found[_CONTEXT],
                rope_theta=_float32(found.get(_THETA, _DEFAULT_THETA)),
                rms_norm_eps=_float32(found[_EPSILON]),
                qk_norm=self.family.qk_norm,
                attention_bias="blk.0.attn_q.bias" in self._tensors,
                tie_word_embeddings="output.weight" not in self._tensors,
            )
        except (ValueError, KeyError) as error:
            reason = in_words(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
            raise UserError(f"{self.file} is not a model that can be trained here: {reason}") from None
        if _ROPE_FACTORS not in self._tensors:
            return config
        return self._scaled(config)

    def _scaled(self, config: ModelConfig) -> ModelConfig:
        """The configuration with the scaling whose table of divisors the file holds."""
        divisors = torch.from_numpy(np.array(self._tensors[_ROPE_FACTORS].data))
        scaling = RopeScaling(
            rope_type="llama3",
            factor=float(divisors.max()),
            low_freq_factor=1.0,  # the bands of Llama 3.1 and later; the factor differs between models
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
        scaled = config.model_copy(update={"rope_scaling": scaling})
        wanted = inverse_frequencies(config) / inverse_frequencies(scaled)
        if divisors.shape != wanted.shape or not torch.allclose(divisors, wanted, rtol=1e-4):
            raise UserError(
                f"{self.file} divides its rotary frequencies by a table ({_ROPE_FACTORS}) that is not Llama 3's; "
                f"import the original checkpoint, whose config.json says what it is"
            )
        return scaled


def _architecture(gguf: Any, name: str) -> Any:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _float32(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, where the file's bits read 9.999999747378752e-06."""
    return float(str(np.float32(value)))
