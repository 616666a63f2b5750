"""vLLM's fast prefill (`--kv-sharing-fast-prefill`): layers above the last retained one see only what logits need.

vLLM hands the layers at the end of a model that name a sharing target attention metadata of these positions alone;
the model has to choose the same ones. Nobody needs the others there, so the tokens stay the same.

Shapes: N tokens of all requests in a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

from skvr_dist.errors import UserError


class FastPrefill:
    """A decoder whose last layers keep no cache."""

    first_reader: int
    """From this layer on all read the caches of others."""

    def forward(
        self: Any,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, D], zero where nobody asks for logits."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: Tensor | None = None
        for layer in islice(self.layers, self.first_reader):
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        wanted = self._positions_of_logits()
        every = hidden
        if wanted is not None:
            hidden, residual, positions = hidden[wanted], residual[wanted], positions[wanted]
        for layer in islice(self.layers, self.first_reader, None):
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden if wanted is None else torch.zeros_like(every).index_copy_(0, wanted, hidden)

    def _positions_of_logits(self: Any) -> Tensor | None:
        """int [requests or more], among the N; None when vLLM measures its memory."""
        every_layers = get_forward_context().attn_metadata
        if not isinstance(every_layers, dict):
            return None
        metadata = every_layers[self.layers[-1].self_attn.attn.layer_name]
        if not isinstance(metadata, KVSharingFastPrefillMetadata) or metadata.logits_indices_padded is None:
            return None
        return metadata.logits_indices_padded[: metadata.num_logits_indices].long()


class FastQwen3Model(FastPrefill, Qwen3Model):
    pass


class FastQwen2Model(FastPrefill, Qwen2Model):
    pass


class FastLlamaModel(FastPrefill, LlamaModel):
    pass


class FastMistralModel(FastPrefill, MistralModel):
    pass


_FAST = {fast.__bases__[1]: fast for fast in (FastQwen3Model, FastQwen2Model, FastLlamaModel, FastMistralModel)}
"""Our class of each base model of vLLM."""


def stop_prefill_early(model: Any, sources: Sequence[int], vllm_config: VllmConfig) -> None:
    """Run the layers above the last retained one at the positions of logits alone, where vLLM was told to.

    Args:
        model: vLLM's base model.
        sources: int [L].

    Raises:
        UserError: vLLM would run the layers with something that expects all positions.
    """
    if not vllm_config.cache_config.kv_sharing_fast_prefill or max(sources) == len(sources) - 1:
        return
    obstacles = {
        "without --enforce-eager": vllm_config.compilation_config.mode != CompilationMode.NONE,
        "over several pipeline stages": vllm_config.parallel_config.pipeline_parallel_size > 1,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise UserError(
                f"--kv-sharing-fast-prefill does not work {obstacle}; change that, or leave the option out: layers "
                f"{max(sources) + 1} to {len(sources) - 1} then see the whole prompt"
            )
    model.first_reader = max(sources) + 1
    model.__class__ = _FAST[type(model)]
