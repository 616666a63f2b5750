"""Causal language models of transformers at any cache strategy, and those that were pruned to one.

Classes for whole checkpoints have the names of transformers' own, which is what `save_pretrained` calls the
architecture: it stays a plain one. This file travels inside exports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.utils import logging

from skvr_dist.errors import UserError
from skvr_dist.hf.model.cache_config import (
    PrunedLlamaConfig,
    PrunedMistralConfig,
    PrunedQwen2Config,
    PrunedQwen3Config,
    Sources,
    sources_of,
    strategy_text,
    warn_if_untrained,
)
from skvr_dist.hf.model.layers import CACHE, CACHE_NAMES, route, take_cache
from skvr_dist.routing.strategy import CacheStrategy, layer_numbers

logger = logging.get_logger(__name__)

NEWEST_TESTED = Version("5.24")
"""The newest minor release of transformers that all tests ran with; a newer one is checked when it is met."""
_fault: str | None = None
"""Why this code refuses the installed transformers, if it does."""


def require_working_transformers() -> None:
    """Raises `UserError` if the installed transformers is newer than any tested, and decodes wrongly with this code."""
    if _fault is not None:
        raise UserError(_fault)


@torch.no_grad()
def decoding_error(model: Any, prompt: Tensor, new_tokens: int, **options: Any) -> float:
    """How far greedy decoding with a cache is from the same tokens without one.

    Args:
        prompt: int [1, S].
        options: of `generate`, such as `cache_implementation`.

    Returns:
        the largest difference of the logits of the new tokens, as a share of the largest logit.
    """
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        synced_gpus=False,
        **options,
    )
    wanted = model(found.sequences, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    largest = float(wanted.abs().max())
    difference = float((torch.cat(found.logits) - wanted).abs().max())
    return difference / largest if largest else difference


class RoutedForCausalLM:
    """Mixin that gives causal language models of transformers their cache strategies.

    Besides what those take, `from_pretrained` takes `kv_profile` or `kv_source_layers`.
    """

    add_code: ClassVar[Callable[[Path, PreTrainedConfig, str], None] | None] = None
    """Puts this code into the folder of a configuration; None in a copy of it, which transformers copies itself."""

    def __init__(
        self: Any,
        config: PreTrainedConfig,
        kv_profile: str | None = None,
        kv_source_layers: Sequence[int] | None = None,
    ) -> None:
        require_working_transformers()
        super().__init__(config)  # type: ignore[call-arg]
        route(self)
        self._remove_pruned()
        self._set_sources(sources_of(config, kv_profile, kv_source_layers))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; it writes `kv_profile` and `kv_source_layers` as JSON.

        Raises:
            UserError: they are no strategy of the model.
        """
        if kwargs.get("kv_profile") is not None:
            kwargs["kv_profile"] = strategy_text(kwargs["kv_profile"])
        with suppress(UserError):  # `sources_of` refuses it with the number of layers
            if kwargs.get("kv_source_layers") is not None:
                kwargs["kv_source_layers"] = list(layer_numbers(kwargs["kv_source_layers"]))
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _remove_pruned(self) -> None:
        """Do nothing: whole checkpoints have all projections."""

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
            chosen = CacheStrategy(self.config.num_hidden_layers, layer_numbers(strategy))
            sources = sources_of(self.config, kv_source_layers=chosen.kv_source_layers)
        self._set_sources(sources)

    @property
    def retained_layers(self: Any) -> tuple[int, ...]:
        """The layers that keep a cache."""
        return tuple(sorted(set(self.model.kv_sources)))

    def _set_sources(self: Any, sources: Sources) -> None:
        warn_if_untrained(self.config, sources)
        self.model.kv_sources = sources

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """transformers' forward; layers above the last retained one compute the positions of `logits_to_keep` only.

        Args:
            cache: also taken as `past_key_values`, with every version of transformers that is supported.

        Raises:
            TypeError: a keyword that nobody reads, or a cache that cannot be used.
            UserError: there are no tokens, or the cache was filled at another strategy.
        """
        return_dict = {"return_dict": kwargs.pop("return_dict")} if "return_dict" in kwargs else {}
        cache = take_cache(cache, kwargs)
        if input_ids is not None and input_ids.shape[-1] == 0 and (cache is None or cache.get_seq_length() == 0):
            raise UserError("the input has no tokens; give at least one, such as the beginning-of-sequence token")
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
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{CACHE: cache},
            **return_dict,
            **kwargs,
        )

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; every version takes a cache as `cache` and as `past_key_values`."""
        given = [name for name in CACHE_NAMES if kwargs.get(name) is not None]
        if len(given) == 1:
            kwargs[CACHE] = kwargs.pop(given[0])
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the strategy and the code for it, which plain classes pass over.

        Raises:
            UserError: `save_directory` is a file.
        """
        if Path(save_directory).is_file():
            raise UserError(f"cannot save to {save_directory}: it is a file; give the name of a folder")
        sources = self.model.kv_sources
        for name in ("kv_profile", "kv_source_layers"):
            # A plain class takes an argument that config.json has, and passes over it; of any other it says so.
            vars(self.config).pop(name, None)
            vars(self.generation_config).pop(name, None)  # transformers takes arguments of loading for its own
        if sources != tuple(range(len(sources))):
            self.config.kv_source_layers = list(sources)
        # By which `AutoModelForCausalLM` knows a model of ours (`skvr_dist.hf.model.auto`).
        self.config.kv_profiles = getattr(self.config, "kv_profiles", None) or {}
        if self.add_code is not None and kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.add_code(Path(save_directory), self.config, type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _get_static_cache_init_shape(self) -> None:
        """Prevent early allocation of a static cache: it would give memory to layers that keep nothing."""
        return


# `GenerationMixin` by name: transformers makes a subclass on the fly of remote code that does not name it and has a
# `generate` of its own, and a model of a class that no module holds cannot be pickled.
class Qwen3ForCausalLM(RoutedForCausalLM, modeling_qwen3.Qwen3ForCausalLM, GenerationMixin):
    """Qwen3 at any cache strategy."""


class Qwen2ForCausalLM(RoutedForCausalLM, modeling_qwen2.Qwen2ForCausalLM, GenerationMixin):
    """Qwen2 and Qwen2.5 at any cache strategy."""


class LlamaForCausalLM(RoutedForCausalLM, modeling_llama.LlamaForCausalLM, GenerationMixin):
    """Llama at any cache strategy."""


class MistralForCausalLM(RoutedForCausalLM, modeling_mistral.MistralForCausalLM, GenerationMixin):
    """Mistral at any cache strategy."""


class _Pruned:
    """Mixin that removes the key and value projections that were not stored."""

    def _remove_pruned(self: Any) -> None:
        for number, layer in enumerate(self.model.layers):
            if number not in self.config.kv_pruned_to:
                for name in ("k_proj", "v_proj", "k_norm"):
                    if hasattr(layer.self_attn, name):
                        delattr(layer.self_attn, name)


class PrunedQwen3ForCausalLM(_Pruned, Qwen3ForCausalLM, GenerationMixin):
    """Qwen3 for one strategy."""

    config: PrunedQwen3Config
    config_class = PrunedQwen3Config


class PrunedQwen2ForCausalLM(_Pruned, Qwen2ForCausalLM, GenerationMixin):
    """Qwen2 for one strategy."""

    config: PrunedQwen2Config
    config_class = PrunedQwen2Config


class PrunedLlamaForCausalLM(_Pruned, LlamaForCausalLM, GenerationMixin):
    """Llama for one strategy."""

    config: PrunedLlamaConfig
    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(_Pruned, MistralForCausalLM, GenerationMixin):
    """Mistral for one strategy."""

    config: PrunedMistralConfig
    config_class = PrunedMistralConfig


def _find_fault() -> str | None:
    """Decode with small random models; why the installed transformers has to be refused, or None."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
    prompt = torch.arange(1, 9)[None]
    installed = f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, the newest tested"
    generator = torch.Generator().manual_seed(0)
    try:
        for model_class in (Qwen3ForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM, MistralForCausalLM):
            for sources in ((0, 1), (0, 0)):
                model = model_class(model_class.config_class(**shape, **heads)).float()
                model.model.kv_sources = sources
                for parameter in model.parameters():
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
                error = decoding_error(model.eval(), prompt, 4)
                if not error < 1e-3:  # rounding makes 1e-6; a cache that is lost makes 1
                    raise ArithmeticError(f"{model_class.__name__} decodes otherwise with a cache than without")
    except Exception as fault:
        way_out = f"install transformers {NEWEST_TESTED}, or a newer skvr_dist"
        return f"{installed}, and {type(fault).__name__}: {fault}; {way_out}"
    logger.warning_once(f"{installed}; small random models decode rightly with it")
    return None


if Version(transformers.__version__).release[:2] > NEWEST_TESTED.release:
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        _fault = _find_fault()
