"""Small models as GGUF files: any of the types of blocks, and a byte-level tokenizer with a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from support.hf_models import random_weights, shape_of
from support.tokenizers import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.hf.convert.weights import hf_name
from skvr_dist.model.rope import inverse_frequencies

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_Q6_K_BYTES = 210  # of 256 values


def byte_level_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def blocks_of(values: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """A tensor in blocks of a type, or as bfloat16; drawn where the package can only read the type."""
    if kind != Kind.Q6_K:
        return gguf.quantize(values, kind)
    rows, columns = values.shape
    blocks = np.random.default_rng(0).integers(0, 256, (rows, columns // 256, _Q6_K_BYTES), dtype=np.uint8)
    blocks[..., -2:] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)  # the scale of a block
    return blocks.reshape(rows, -1)


def write_gguf(
    file: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    tokenizer: Tokenizer | None = None,
    *,
    split: str = "gpt-2",
    **more: Any,
) -> dict[str, NDArray[Any]]:
    """Write a model as llama.cpp's converter does; returns what its weights then are, by canonical name.

    Args:
        kinds: type of the tensors whose canonical name ends so; float32 for the others.
        split: name of the rule by which the tokenizer splits texts.
        more: further metadata under the architecture's name, with dots as double underscores.
    """
    architecture = FAMILIES[config.architecture].gguf_architecture or "llama"
    writer = gguf.GGUFWriter(file, architecture)
    _add_shape(writer, architecture, config)
    for name, value in more.items():
        key = f"{architecture}.{name.replace('__', '.')}"
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, split)
    if config.rope_scaling is not None:
        plain = inverse_frequencies(config.model_copy(update={"rope_scaling": None}))
        writer.add_tensor("rope_freqs.weight", (plain / inverse_frequencies(config)).numpy())
    known = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config.num_hidden_layers)
    stored = {}
    for name, tensor in weights.items():
        values = tensor.numpy().astype(np.float32)
        kind = next((kind for end, kind in kinds.items() if name.endswith(end)), Kind.F32)
        blocks = blocks_of(values, kind)
        stored[name] = gguf.dequantize(blocks, kind)
        part = name.split(".")[-2]
        if architecture == "llama" and part in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            # Rows i and i + E / 2 of a head, which rotate together, lie side by side.
            halves = blocks.reshape(heads, 2, config.head_dim // 2, *blocks.shape[1:])
            blocks = np.stack((halves[:, 0], halves[:, 1]), axis=2).reshape(blocks.shape)
        module, _, ending = hf_name(name).rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{ending}", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _add_shape(writer: gguf.GGUFWriter, architecture: str, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    elif architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, split: str) -> None:
    tokens = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


VOCABULARY = 320


# Rows must hold whole blocks: 32 values, or 256 of Q6_K.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 256,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}


LLAMA3 = RopeScaling(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


MODELS = {
    "llama": shape_of("llama", **SHAPE),
    "llama 3 tied": shape_of("llama", **SHAPE | {"rope_theta": 5e5, "rope_scaling": LLAMA3}, tie_word_embeddings=True),
    "llama biased": shape_of("llama", **SHAPE, attention_bias=True),
    "qwen3": shape_of("qwen3", **SHAPE | {"head_dim": 32}),
    "qwen2": shape_of("qwen2", **SHAPE),
    "qwen2 tied": shape_of("qwen2", **SHAPE, tie_word_embeddings=True),
}


KINDS = {
    "q_proj.weight": Kind.Q4_0,
    "k_proj.weight": Kind.Q4_1,
    "v_proj.weight": Kind.Q5_1,
    "o_proj.weight": Kind.Q5_0,
    "0.mlp.down_proj.weight": Kind.Q6_K,
    "1.mlp.down_proj.weight": Kind.Q8_0,
    "gate_proj.weight": Kind.BF16,
    "up_proj.weight": Kind.F16,
    "embed_tokens.weight": Kind.Q8_0,
}


TOKENIZER = byte_level_tokenizer([TEXT], VOCABULARY)


def write(file: Path, config: ModelConfig, **more: Any) -> Mapping[str, np.ndarray]:
    return write_gguf(file, config, random_weights(config), KINDS, TOKENIZER, **more)
