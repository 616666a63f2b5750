"""Which class `AutoModelForCausalLM` makes of a checkpoint: ours if it speaks of caches, else that of transformers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from skvr_dist.hf.convert.bundle import add_code
from skvr_dist.hf.model import causal_lm
from skvr_dist.hf.model.cache_config import PrunedLlamaConfig, PrunedMistralConfig, PrunedQwen3Config

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
    plain, routed = transformers.Qwen3ForCausalLM, causal_lm.Qwen3ForCausalLM


class _Llama(_Choice):
    plain, routed = transformers.LlamaForCausalLM, causal_lm.LlamaForCausalLM


class _Mistral(_Choice):
    plain, routed = transformers.MistralForCausalLM, causal_lm.MistralForCausalLM


def register() -> None:
    """Teach the Auto classes of this process our models, and these to be saved with their code."""
    causal_lm.RoutedForCausalLM.add_code = staticmethod(add_code)
    for config, choice in ((Qwen3Config, _Qwen3), (LlamaConfig, _Llama), (MistralConfig, _Mistral)):
        AutoModelForCausalLM.register(config, choice, exist_ok=True)
    for config, model in (
        (PrunedQwen3Config, causal_lm.PrunedQwen3ForCausalLM),
        (PrunedLlamaConfig, causal_lm.PrunedLlamaForCausalLM),
        (PrunedMistralConfig, causal_lm.PrunedMistralForCausalLM),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
