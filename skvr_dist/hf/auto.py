"""Which class `AutoModelForCausalLM` makes of a checkpoint: ours if it speaks of caches, else that of transformers."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from skvr_dist.hf.causal_lm import (
    PrunedLlamaForCausalLM,
    PrunedMistralForCausalLM,
    PrunedQwen3ForCausalLM,
    RoutedLlamaForCausalLM,
    RoutedMistralForCausalLM,
    RoutedQwen3ForCausalLM,
)
from skvr_dist.hf.configuration import PrunedLlamaConfig, PrunedMistralConfig, PrunedQwen3Config

_SPEAKS_OF_CACHES = ("kv_profiles", "kv_profile", "kv_source_layers")


class _Choice:
    """Stands for two classes where an Auto class expects one."""

    plain: Any
    routed: Any

    @classmethod
    def _class_for(cls, config: PreTrainedConfig, asked: dict[str, Any]) -> Any:
        speaks = any(name in asked or hasattr(config, name) for name in _SPEAKS_OF_CACHES)
        return cls.routed if speaks else cls.plain

    @classmethod
    def from_pretrained(cls, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return cls._class_for(config, kwargs).from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
        return cls._class_for(config, kwargs)._from_config(config, **kwargs)


class _Qwen3(_Choice):
    plain, routed = Qwen3ForCausalLM, RoutedQwen3ForCausalLM


class _Llama(_Choice):
    plain, routed = LlamaForCausalLM, RoutedLlamaForCausalLM


class _Mistral(_Choice):
    plain, routed = MistralForCausalLM, RoutedMistralForCausalLM


def register() -> None:
    """Teach the Auto classes of this process our models."""
    for config, choice in ((Qwen3Config, _Qwen3), (LlamaConfig, _Llama), (MistralConfig, _Mistral)):
        AutoModelForCausalLM.register(config, choice, exist_ok=True)
    for config, model in (
        (PrunedQwen3Config, PrunedQwen3ForCausalLM),
        (PrunedLlamaConfig, PrunedLlamaForCausalLM),
        (PrunedMistralConfig, PrunedMistralForCausalLM),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
