"""Causal language models of transformers at any cache strategy, and those that were pruned to one.

This file travels inside exports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache, LlamaForCausalLM, MistralForCausalLM, PreTrainedConfig, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from skvr_dist.errors import UserError
from skvr_dist.hf.configuration import (
    PrunedLlamaConfig,
    PrunedMistralConfig,
    PrunedQwen3Config,
    Sources,
    sources_of,
    warn_if_untrained,
)
from skvr_dist.hf.modeling import route
from skvr_dist.routing.strategy import CacheStrategy


class RoutedForCausalLM:
    """What our classes add to the causal language models of transformers.

    Besides what those take, `from_pretrained` takes `kv_profile` or `kv_source_layers`.
    """

    def __init__(
        self: Any,
        config: PreTrainedConfig,
        kv_profile: str | None = None,
        kv_source_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        route(self)
        self._set_sources(sources_of(config, kv_profile, kv_source_layers))

    def set_cache_strategy(self: Any, strategy: str | Sequence[int]) -> None:
        """Choose the layers that keep a cache from the next prompt on.

        Args:
            strategy: a profile of the checkpoint, `full`, `every:G`, `prefix:M`, or the retained layers.

        Raises:
            UserError: the strategy is unknown or impossible, or needs a layer that was pruned.
        """
        if isinstance(strategy, str):
            sources = sources_of(self.config, kv_profile=strategy)
        else:
            sources = CacheStrategy(self.config.num_hidden_layers, tuple(strategy)).kv_source_layers
        self._set_sources(sources)

    @property
    def retained_layers(self: Any) -> tuple[int, ...]:
        """The layers that keep a cache."""
        return tuple(sorted(set(self.model.kv_sources)))

    def _set_sources(self: Any, sources: Sources) -> None:
        for number in set(sources):
            if not hasattr(self.model.layers[number].self_attn, "k_proj"):
                raise UserError(
                    f"layer {number} was pruned from this checkpoint and cannot keep a cache; retain some of layers "
                    f"{sorted(set(sources_of(self.config)))}, or load the whole checkpoint"
                )
        warn_if_untrained(self.config, sources)
        self.model.kv_sources = sources

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As in transformers; layers above the last retained one compute the positions of `logits_to_keep` only."""
        captures = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        # Packed sequences have several last positions.
        if isinstance(logits_to_keep, int) and logits_to_keep > 0 and not captures and "cu_seq_lens_q" not in kwargs:
            kwargs["last_positions"] = logits_to_keep
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _get_static_cache_init_shape(self) -> None:
        """No early start of a static cache: it would give memory to layers that keep nothing."""
        return


class RoutedQwen3ForCausalLM(RoutedForCausalLM, Qwen3ForCausalLM):
    """Qwen3 at any cache strategy."""


class RoutedLlamaForCausalLM(RoutedForCausalLM, LlamaForCausalLM):
    """Llama at any cache strategy."""


class RoutedMistralForCausalLM(RoutedForCausalLM, MistralForCausalLM):
    """Mistral at any cache strategy."""


class _Pruned:
    """Without the key and value projections that the configuration's strategy does not read."""

    def __init__(self: Any, config: PreTrainedConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)  # type: ignore[call-arg]
        owners = set(sources_of(config, kv_source_layers=config.kv_source_layers))
        for number, layer in enumerate(self.model.layers):
            if number not in owners:
                for name in ("k_proj", "v_proj", "k_norm"):
                    if hasattr(layer.self_attn, name):
                        delattr(layer.self_attn, name)


class PrunedQwen3ForCausalLM(_Pruned, RoutedQwen3ForCausalLM):
    """Qwen3 for one strategy."""

    config: PrunedQwen3Config
    config_class = PrunedQwen3Config


class PrunedLlamaForCausalLM(_Pruned, RoutedLlamaForCausalLM):
    """Llama for one strategy."""

    config: PrunedLlamaConfig
    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(_Pruned, RoutedMistralForCausalLM):
    """Mistral for one strategy."""

    config: PrunedMistralConfig
    config_class = PrunedMistralConfig
