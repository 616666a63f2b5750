"""Our model section as a configuration of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from skvr_dist.model.config import ModelConfig

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Fields with the same name and meaning on both sides.
_SHARED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
}


def hf_config(config: ModelConfig, dtype: torch.dtype, special_ids: dict[str, int]) -> PreTrainedConfig:
    """The configuration of the family that the model is published as.

    Args:
        dtype: of the stored weights.
        special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, or nothing without a tokenizer.
    """
    family: dict[str, Any] = {}
    if config.architecture == "mistral":
        family["sliding_window"] = None  # transformers' default is a window of 4096
    else:
        family["attention_bias"] = config.attention_bias
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else {"rope_type": "default"}
    return AutoConfig.for_model(
        config.architecture,
        architectures=[ARCHITECTURES[config.architecture]],
        dtype=dtype,
        rope_parameters={**scaling, "rope_theta": config.rope_theta},
        **config.model_dump(include=_SHARED),
        **family,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special_ids},
    )


def write_config(folder: Path, config: PreTrainedConfig) -> None:
    """Write config.json, with the rotary embedding in the spelling of transformers 4 as well as of 5.

    Readers that do not know `rope_parameters` would silently take a theta of 10000 and no scaling.
    """
    config.save_pretrained(folder)
    file = folder / "config.json"
    stored = json.loads(file.read_text())
    scaling = dict(stored["rope_parameters"])
    stored["rope_theta"] = scaling.pop("rope_theta")
    if scaling["rope_type"] != "default":
        stored["rope_scaling"] = scaling
    file.write_text(json.dumps(stored, indent=2) + "\n")
