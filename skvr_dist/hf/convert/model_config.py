"""Our model section as a configuration of transformers, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoConfig, PreTrainedConfig

from skvr_dist.config.families import FAMILIES
from skvr_dist.config.model import ModelConfig, RopeScaling
from skvr_dist.errors import UserError
from skvr_dist.routing import CacheStrategy
from skvr_dist.section import in_words

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


_KNOWN_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "dual_chunk_attention_config": (None,),
}
"""What our decoder computes, of the fields of which it has no choice."""
_LAYER_TYPES = {"full_attention"}


def hf_config(
    config: ModelConfig, dtype: torch.dtype, special_ids: Mapping[str, Any], pruned_to: CacheStrategy | None = None
) -> PreTrainedConfig:
    """The configuration of the family that the model is published as.

    Args:
        dtype: of the stored weights.
        special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, or nothing without a tokenizer.
        pruned_to: the strategy whose projections alone are stored; the architecture is then one of ours.
    """
    family = FAMILIES[config.architecture]
    model_type: str = family.name
    architecture = family.causal_lm
    fields = dict(family.hf_fields)
    if family.attention_bias == "optional":
        fields["attention_bias"] = config.attention_bias
    shared = _SHARED - {"head_dim"} if family.head_dim == "hidden_size / heads" else _SHARED
    scaling = config.rope_scaling.model_dump(exclude_none=True) if config.rope_scaling else {"rope_type": "default"}
    if pruned_to is not None:
        model_type, architecture = f"skvr_{model_type}", f"Pruned{architecture}"
        fields |= {"kv_pruned_to": list(pruned_to.retained), "kv_source_layers": list(pruned_to.kv_source_layers)}
    return AutoConfig.for_model(
        model_type,
        architectures=[architecture],
        dtype=dtype,
        rope_parameters={**scaling, "rope_theta": config.rope_theta},
        **config.model_dump(include=shared),
        **fields,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special_ids},
    )


def require_family(model_type: str) -> None:
    """Raises `UserError` if no family of ours has this name in config.json."""
    if model_type not in FAMILIES:
        raise UserError(
            f"the checkpoint is of model_type {model_type}, but only {', '.join(FAMILIES)} can be imported; "
            f"choose a checkpoint of one of these families"
        )


def model_config(config: PreTrainedConfig) -> ModelConfig:
    """Our model section for a checkpoint of one of the families.

    Raises:
        UserError: another architecture, or a feature of the family that our decoder lacks.
    """
    require_family(config.model_type)
    family = FAMILIES[config.model_type]
    rope = dict(config.rope_parameters)
    theta, kind = rope.pop("rope_theta", None), rope.get("rope_type", "default")
    others = [name for name, known in _KNOWN_VALUES.items() if getattr(config, name, known[0]) not in known]
    unknown = [f"{name} {getattr(config, name)}" for name in others]
    unknown += [f"layer type {kind}" for kind in set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES]
    if kind not in ("default", "linear", "llama3"):
        unknown.append(f"rope_type {kind}")
    if unknown:
        # To deny what every token meets would make another model, and no comparison would find it.
        may_be_denied = not {"hidden_act", "mlp_bias"} & set(others)
        denied = ", or change its config.json if the texts you train on never meet it" if may_be_denied else ""
        raise UserError(
            f"the checkpoint has {' and '.join(unknown)}, which our decoder has not; choose another checkpoint{denied}"
        )
    try:
        return ModelConfig(
            architecture=family.name,
            qk_norm=family.qk_norm,
            attention_bias=family.attention_bias == "q, k and v" or getattr(config, "attention_bias", False),
            rope_theta=theta,
            rope_scaling=None if kind == "default" else RopeScaling(**_known(rope)),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            **{name: getattr(config, name) for name in _SHARED - {"head_dim"}},
        )
    except ValidationError as error:
        raise UserError(
            f"the checkpoint's config.json is not one of a trainable {family.name} model: {in_words(error)}; use the "
            f"config.json that belongs to the weights"
        ) from None


def _known(rope: dict[str, Any]) -> dict[str, Any]:
    return {name: rope[name] for name in RopeScaling.model_fields if name in rope}


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
