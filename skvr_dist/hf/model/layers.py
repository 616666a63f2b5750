"""Decoders of transformers, of each of our families, where a layer may read an earlier one's keys and values.

Each class here is the class of transformers with the same name and parameters, and computes the same where every
layer reads its own. Layers that nobody reads skip their key and value projections and hold no cache. Keys and values
go from layer to layer as explicit tensors, so that gradient checkpointing and FSDP see them.

Shapes: B batch, S positions of this call, T positions with the cache's, D hidden, H heads, K key/value heads,
E head_dim, L layers. This file travels inside exports.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from skvr_dist.errors import UserError
from skvr_dist.hf.model.cache_config import Sources

RopeTables = tuple[Tensor, Tensor]
"""cos and sin, each [B, S, E]."""

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Keyword by which the installed transformers takes the cache: `cache` from 5.24 on, `past_key_values` before."""
CACHE_NAMES = ("cache", "past_key_values")
_KEYWORDS = (
    TransformersKwargs.__optional_keys__
    | TransformersKwargs.__required_keys__
    | (inspect.signature(ForCausalLMLoss).parameters.keys() - {"logits", "labels", "vocab_size", "kwargs"})
)
"""Keywords that the installed transformers passes through models to layers, attention kernels and the loss."""
_OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""What `generate` takes for stop strings and drafts, and hands on to every forward pass, where nobody reads it."""


def take_cache(given: Cache | PagedAttentionCache | None, kwargs: dict[str, Any]) -> Any:
    """The one cache of a call, given by position or as `cache` or `past_key_values`, which leave `kwargs`.

    Raises:
        TypeError: two caches, one of another type, or a keyword that nobody reads: a cache under a name of another
            version would be lost silently, and tokens computed without what they follow.
    """
    for name in _OF_GENERATE:
        kwargs.pop(name, None)
    found = {"cache": given, "past_key_values": kwargs.pop("past_key_values", None)}
    found = {name: cache for name, cache in found.items() if cache is not None}
    if len(found) > 1:
        raise TypeError(f"the cache was given twice, as {' and as '.join(found)}; give it once")
    for name, cache in found.items():
        if not isinstance(cache, Cache | PagedAttentionCache):
            raise TypeError(
                f"{name} is a {type(cache).__name__}, not a Cache of transformers; give "
                f"DynamicCache(config=model.config)"
            )
    cache = next(iter(found.values()), None)
    if not isinstance(cache, PagedAttentionCache):  # continuous batching has keywords of its own for its kernels
        _require_known(kwargs)
    return cache


def _require_known(kwargs: Mapping[str, Any]) -> None:
    unknown = [name for name in kwargs if name not in _KEYWORDS]
    if unknown:
        raise TypeError(
            f"forward() got an unexpected keyword argument {unknown[0]!r}, a {type(kwargs[unknown[0]]).__name__}; a "
            f"cache is given as {' or '.join(CACHE_NAMES)}"
        )
    unused = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    if unused:
        raise TypeError(f"{unused[0]} holds a cache that would not be used; give it as {' or '.join(CACHE_NAMES)}")


def _rotate(x: Tensor, rope: RopeTables) -> Tensor:
    """Rotate heads [B, H, S, E]."""
    cos, sin = (table.unsqueeze(1) for table in rope)
    return x * cos + modeling_llama.rotate_half(x) * sin


class RoutedAttention:
    """Attention that reads its own keys and values or a donor's."""

    unread: Callable[[Tensor, list[nn.Parameter]], Tensor] | None = None
    """Applied to the normed hidden states and the key/value parameters where those are not used."""

    def kv_parameters(self) -> list[nn.Parameter]:
        """The trained parameters that only keys and values depend on."""
        modules = [getattr(self, name, None) for name in ("k_proj", "v_proj", "k_norm")]
        return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]

    def _heads(self: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def project_kv(self: Any, x: Tensor, rope: RopeTables) -> tuple[Tensor, Tensor]:
        """Keys and values as a cache stores them, each [B, K, S, E]."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if hasattr(self, "k_norm"):
            k = self.k_norm(k)
        return _rotate(k.transpose(1, 2), rope), v.transpose(1, 2)

    def forward(
        self: Any,
        x: Tensor,
        rope: RopeTables,
        attention_mask: Any,
        k: Tensor,
        v: Tensor,
        paged: PagedAttentionCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from normed hidden states x [B, S, D] to keys and values of T positions.

        Args:
            paged: the cache of continuous batching, in which every layer has pages of its own, also for a donor's keys.

        Returns:
            [B, S, D], and the attention weights where the kernel has them.
        """
        q = self._heads(self.q_proj(x))
        if hasattr(self, "q_norm"):
            q = self.q_norm(q)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        if paged is not None and CACHE == "cache":
            k, v = paged.update(k, v, self.layer_idx, kwargs=kwargs)
        elif paged is not None:  # then the kernel updates it
            kwargs["cache"] = paged
        out, weights = attend(
            self,
            _rotate(q.transpose(1, 2), rope),
            k,
            v,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=None,
            **kwargs,
        )
        return self.o_proj(out.flatten(2).contiguous()), weights


class RoutedDecoderLayer:
    """A layer that takes a donor's keys and values in and hands its own out."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        donor_k: Tensor | None,
        donor_v: Tensor | None,
        *,
        own_is_read: bool,
        last_positions: int | None,
        position_embeddings: RopeTables,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer. The cache comes under the name that transformers' checkpointing of layers knows.

        Args:
            hidden_states: [B, S, D].
            donor_k, donor_v: what this layer reads instead of its own keys and values, each [B, K, T, E].
            own_is_read: whether anyone reads this layer's own keys and values; if not, they are not computed.
            last_positions: compute only that many positions after the keys and values; the mask is for these.

        Returns:
            hidden states, and this layer's own keys and values if they are read.
        """
        cache: Cache | None = kwargs.pop(CACHE)
        x = self.input_layernorm(hidden_states)
        attention = self.self_attn
        own_k = own_v = None
        if own_is_read:
            own_k, own_v = attention.project_kv(x, position_embeddings)
            if cache is not None:
                if cache.offloading and len(cache.layers) > attention.layer_idx:
                    # An offloaded cache fetches the next layer ahead, which need not be the next one that it holds.
                    cache.layers[attention.layer_idx].prefetch()
                own_k, own_v = cache.update(own_k, own_v, attention.layer_idx)
        elif attention.unread is not None and torch.is_grad_enabled():
            x = attention.unread(x, attention.kv_parameters())
        if last_positions is not None:
            hidden_states, x = hidden_states[:, -last_positions:], x[:, -last_positions:]
            position_embeddings = _last_rope(position_embeddings, last_positions)
        k, v = (own_k, own_v) if donor_k is None else (donor_k, donor_v)
        attended, _ = attention(x, position_embeddings, attention_mask, k, v, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), own_k, own_v


def _last_rope(rope: RopeTables, count: int) -> RopeTables:
    return rope[0][:, -count:], rope[1][:, -count:]


class RoutedModel:
    """A base model whose layers run by a map of which layer reads which."""

    kv_sources: Sources
    """The layer that each layer reads, unless `draw_sources` draws them."""
    draw_sources: Callable[[], Sequence[int]] | None = None
    """Draws the donors of one forward pass, int [L]; used in training mode where gradients are recorded."""

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_positions: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """transformers' forward, in any version that is supported.

        Args:
            cache: also taken as `past_key_values`.
            last_positions: return hidden states of that many last positions only. Nobody needs the others once the
                last keys and values that are read have been computed, so the layers above run on those alone.

        Raises:
            TypeError: a keyword that nobody reads, or a cache that cannot be used.
        """
        cache = take_cache(cache, kwargs)
        paged = cache if isinstance(cache, PagedAttentionCache) else None
        cache = None if paged is not None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None and paged is None:
            cache = DynamicCache(config=self.config)
        seen = cache.get_seq_length() if cache is not None else 0
        positions = hidden.shape[1]
        if position_ids is None:
            position_ids = (torch.arange(positions, device=hidden.device) + seen).unsqueeze(0)
        mask = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=mask,
            position_ids=position_ids,
            **{CACHE: paged if paged is not None and CACHE == "cache" else cache},
        )
        last_mask = None
        if last_positions is not None:
            if last_positions >= positions or self._needs_all_positions(mask, position_ids):
                last_positions = None
            else:
                keys = positions if cache is None else cache.get_mask_sizes(positions, 0)[0]
                rows = torch.arange(positions - last_positions, positions, device=hidden.device) + seen
                last_mask = self._last_mask(mask, rows, keys)
        kwargs |= {"use_cache": use_cache, "paged": paged}
        rope = self.rotary_emb(hidden, position_ids=position_ids)
        hidden = self._run_layers(hidden, rope, mask, position_ids, cache, last_positions, last_mask, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), **{CACHE: cache if use_cache else None})

    def _last_mask(self: Any, mask: Tensor | None, rows: Tensor, keys: int) -> Tensor | None:
        """The mask of the last queries, which are at `rows` of the keys, int [last positions], of which there are T."""
        if mask is None and self.config._attn_implementation == "sdpa":
            # Without a mask SDPA takes several queries for those of the first keys, and lets a single one see all
            # keys, also those that a static cache has not filled.
            return (torch.arange(keys, device=rows.device) <= rows[:, None])[None, None]
        # A mask [B, T] over keys, which flash attention takes, has no rows of queries.
        return mask[:, :, -len(rows) :] if mask is not None and mask.dim() == 4 else mask

    def _sources(self: Any, layers: int) -> Sequence[int]:
        """The layer that each of the first layers reads in this pass, int [L]."""
        draws = self.training and torch.is_grad_enabled() and self.draw_sources is not None
        return (self.draw_sources() if draws else self.kv_sources)[:layers]

    def _run_layers(
        self: Any,
        hidden: Tensor,
        rope: RopeTables,
        mask: Any,
        position_ids: Tensor,
        cache: Cache | None,
        last_positions: int | None,
        last_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, S, D] after the last layer, of `last_positions` positions if that is not None."""
        layers = self.layers[: self.config.num_hidden_layers]  # transformers lowers it to draft with the first ones
        sources = self._sources(len(layers))
        read = set(sources)
        if cache is not None:
            _require_same_strategy(cache, read)
        last_reader = {source: reader for reader, source in enumerate(sources)}
        known: dict[int, tuple[Tensor, Tensor]] = {}
        for number, layer in enumerate(layers):
            stops_here = last_positions if number == max(read) else None
            if stops_here is not None:
                mask, position_ids = last_mask, position_ids[:, -stops_here:]
            hidden, k, v = layer(
                hidden,
                *(known[sources[number]] if sources[number] != number else (None, None)),
                own_is_read=number in read,
                last_positions=stops_here,
                position_embeddings=rope,
                attention_mask=mask,
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
            if k is not None:
                known[number] = (k, v)
            # Offloaded and quantized caches hold less than what the layers read of them, which must not pile up.
            known = {source: kv for source, kv in known.items() if last_reader[source] > number}
            del k, v
            if stops_here is not None:
                rope = _last_rope(rope, stops_here)
        return hidden

    def _needs_all_positions(self: Any, mask: Any, position_ids: Tensor) -> bool:
        """Whether attention cannot be asked for the last queries alone."""
        if mask is None and is_flash_attention_requested(self.config):
            # It tells packed texts apart by positions that begin anew, taking those of the queries for the keys' too.
            return bool((position_ids.diff() < 0).any())
        return not isinstance(mask, Tensor | None)  # the block masks of flex attention belong to all positions


def _require_same_strategy(cache: Cache, read: set[int]) -> None:
    """Raises `UserError` if a cache was filled at another strategy; layers that are never filled hold nothing."""
    filled = [number for number, layer in enumerate(cache.layers) if layer.is_initialized]
    if filled and filled != sorted(read):
        raise UserError(
            f"this cache holds layers {filled}, but the model's strategy reads layers {sorted(read)}; start with a new "
            f"cache after a change of strategy, and let the model be the first to fill it"
        )


class Qwen3Attention(RoutedAttention, modeling_qwen3.Qwen3Attention):
    pass


class Qwen2Attention(RoutedAttention, modeling_qwen2.Qwen2Attention):
    pass


class LlamaAttention(RoutedAttention, modeling_llama.LlamaAttention):
    pass


class MistralAttention(RoutedAttention, modeling_mistral.MistralAttention):
    pass


class Qwen3DecoderLayer(RoutedDecoderLayer, modeling_qwen3.Qwen3DecoderLayer):
    pass


class Qwen2DecoderLayer(RoutedDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    pass


class LlamaDecoderLayer(RoutedDecoderLayer, modeling_llama.LlamaDecoderLayer):
    pass


class MistralDecoderLayer(RoutedDecoderLayer, modeling_mistral.MistralDecoderLayer):
    pass


class Qwen3Model(RoutedModel, modeling_qwen3.Qwen3Model):
    pass


class Qwen2Model(RoutedModel, modeling_qwen2.Qwen2Model):
    pass


class LlamaModel(RoutedModel, modeling_llama.LlamaModel):
    pass


class MistralModel(RoutedModel, modeling_mistral.MistralModel):
    pass


_ROUTED = {
    routed.__bases__[1]: routed
    for routed in (
        *(Qwen3Attention, Qwen3DecoderLayer, Qwen3Model),
        *(Qwen2Attention, Qwen2DecoderLayer, Qwen2Model),
        *(LlamaAttention, LlamaDecoderLayer, LlamaModel),
        *(MistralAttention, MistralDecoderLayer, MistralModel),
    )
}
"""Our class of each class of transformers. They have its name, by which FSDP policies and device maps know it."""
PLAIN_MODELS = tuple(plain for plain, routed in _ROUTED.items() if issubclass(routed, RoutedModel))


def route(model: nn.Module) -> Any:
    """Let the layers of a model of transformers, of one of our families, read one another, in place.

    The model keeps its parameters, hooks and adapters, and computes the same until a map says otherwise.

    Args:
        model: the model itself or anything that contains it, such as a PEFT model.

    Returns:
        the routed base model.

    Raises:
        UserError: there is no such model in it, or it has a sliding window.
    """
    *others, last = (plain.__name__.removesuffix("Model") for plain in PLAIN_MODELS)
    if not isinstance(model, nn.Module):
        raise UserError(f"{model!r} is no model; load one of {', '.join(others)} or {last} with from_pretrained first")
    bases = [module for module in model.modules() if isinstance(module, PLAIN_MODELS)]
    if len(bases) != 1:
        raise UserError(
            f"{type(model).__name__} holds {len(bases)} {', '.join(others)} or {last} decoders; routing needs exactly "
            f"one"
        )
    base = bases[0]
    if isinstance(base, RoutedModel):
        return base
    window = getattr(base.config, "sliding_window", None)
    if window is not None:
        raise UserError(
            f"the model has a sliding window of {window} tokens, which routed attention has not; set "
            f"config.sliding_window to null before loading if no text is longer than that"
        )
    for module in base.modules():
        if type(module) in _ROUTED:
            module.__class__ = _ROUTED[type(module)]
            if "_old_forward" in vars(module):  # accelerate placed it on a device: what its hook calls
                module._old_forward = types.MethodType(type(module).forward, module)
    # transformers looks the outputs that can be captured up by class, and registers classes where they are constructed.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(base)), base._can_record_outputs)
    base.kv_sources = tuple(range(base.config.num_hidden_layers))
    return base
