"""vLLM's models of each of our families at the cache strategy of the configuration; without one they are vLLM's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from skvr_dist.hf.convert.weight_files import require_same_for_vllm
from skvr_dist.hf.model.cache_config import sources_of, warn_if_untrained
from skvr_dist.serve.fast_prefill import stop_prefill_early
from skvr_dist.serve.sharing import reader_weights, share


class _Shared:
    """Mixin that makes layers of a vLLM model share caches as its configuration says."""

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.kv_sources = sources_of(config)
        folder = Path(vllm_config.model_config.model)
        if hasattr(config, "kv_profiles") and folder.is_dir():  # an export of ours, not a repository of the Hub
            require_same_for_vllm(folder)
        warn_if_untrained(config, self.kv_sources)
        share(self.model, self.kv_sources, vllm_config, maybe_prefix(prefix, "model"))
        stop_prefill_early(self.model, self.kv_sources, vllm_config)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(reader_weights(weights, self.kv_sources))  # type: ignore[misc]


class SharedQwen3ForCausalLM(_Shared, Qwen3ForCausalLM):
    """Qwen3, some layers reading the caches of others."""


class SharedQwen2ForCausalLM(_Shared, Qwen2ForCausalLM):
    """Qwen2, some layers reading the caches of others."""


class SharedLlamaForCausalLM(_Shared, LlamaForCausalLM):
    """Llama, some layers reading the caches of others."""


class SharedMistralForCausalLM(_Shared, MistralForCausalLM):
    """Mistral, some layers reading the caches of others."""
