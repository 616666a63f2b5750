"""Turning layers of a vLLM model into readers of another layer's cache, before any weight is loaded.

A reader has no key and value projections and no cache. vLLM leaves the caches of layers that name a sharing target
out of its budget, so the same memory holds more tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama import LlamaAttention
from vllm.model_executor.models.mistral import MistralAttention
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen3 import Qwen3Attention

from skvr_dist.errors import UserError

# Not `q_proj`: vLLM stacks weights of that name with those of k_proj and v_proj.
_QUERY = "query_proj"
_UNUSED = (".k_proj.", ".v_proj.", ".k_norm.")
# What readers use of vLLM's attention, besides the arguments of its forward.
_USED = ["qkv_proj", "o_proj", "rotary_emb", "hidden_size", "total_num_heads", "head_dim", "attn.layer_name"]
_USED += ["attn.kv_sharing_target_layer_name", "attn.impl.kv_sharing_target_layer_name"]
_ARGUMENTS = ["self", "positions", "hidden_states"]


class Reader:
    """Attention that brings only its query."""

    def forward(self: Any, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Attend from hidden states [tokens, D]."""
        q, _ = self.query_proj(hidden_states)
        if hasattr(self, "q_norm"):
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, _ = self.rotary_emb(positions, q)
        output, _ = self.o_proj(self.attn(q, None, None))
        return output


class Qwen3Reader(Reader, Qwen3Attention):
    pass


class Qwen2Reader(Reader, Qwen2Attention):
    pass


class LlamaReader(Reader, LlamaAttention):
    pass


class MistralReader(Reader, MistralAttention):
    pass


_READERS = {reader.__bases__[1]: reader for reader in (Qwen3Reader, Qwen2Reader, LlamaReader, MistralReader)}
"""Our class of each attention of vLLM."""


def require_known_attention(attention: Any) -> None:
    """Raises `UserError` if vLLM's attention is not built as the version that readers were written for.

    A target that nobody looks at any more would leave readers with an empty cache of their own, and wrong tokens.
    """
    missing = [f"no {name}" for name in _USED if not _has(attention, name)]
    arguments = list(inspect.signature(type(attention).forward).parameters)
    if arguments != _ARGUMENTS:
        missing.append(f"a forward of {', '.join(arguments)} instead of {', '.join(_ARGUMENTS)}")
    if type(attention) not in _READERS:
        missing.append("no reader here")
    if missing:
        raise UserError(
            f"vLLM {vllm.__version__}: its {type(attention).__name__} has {missing[0]}, but sharing caches needs one; "
            f"serve with vLLM 0.32, with a newer skvr_dist, or at full retention"
        )


def _has(value: Any, name: str) -> bool:
    try:
        attrgetter(name)(value)
    except AttributeError:
        return False
    return True


def require_one_stage(sources: Sequence[int], start: int, stop: int) -> None:
    """Raises `UserError` if a layer of the stage from `start` to `stop` reads the cache of an earlier stage."""
    for reader in range(start, stop):
        if sources[reader] < start:
            raise UserError(
                f"layer {reader} reads the cache of layer {sources[reader]}, but a pipeline stage begins at layer "
                f"{start} between them, and vLLM's stages do not share caches; retain layer {start} too, or serve "
                f"with pipeline_parallel_size 1"
            )


def share(model: Any, sources: Sequence[int], vllm_config: VllmConfig, prefix: str) -> None:
    """Make readers of the layers whose source is another layer.

    Args:
        model: vLLM's base model, its layers built but not loaded.
        sources: int [L].
        prefix: of the names of its modules.
    """
    require_one_stage(sources, model.start_layer, model.end_layer)
    if vllm_config.lora_config is not None and len(set(sources)) < len(sources):
        raise UserError(
            "vLLM would leave out what LoRA adapters add to layers that read the cache of others; merge the adapter "
            "into the checkpoint, or serve at full retention"
        )
    for number in range(model.start_layer, model.end_layer):
        if sources[number] == number:
            continue
        attention, source = model.layers[number].self_attn, model.layers[sources[number]].self_attn
        require_known_attention(attention)
        attention.query_proj = ColumnParallelLinear(
            attention.hidden_size,
            attention.total_num_heads * attention.head_dim,
            bias=attention.qkv_proj.bias is not None,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.layers.{number}.self_attn.q_proj",  # by which quantized checkpoints know it
        )
        del attention.qkv_proj
        if hasattr(attention, "k_norm"):
            del attention.k_norm
        for owner in (attention.attn, attention.attn.impl):
            owner.kv_sharing_target_layer_name = source.attn.layer_name
        attention.__class__ = _READERS[type(attention)]


def reader_weights(weights: Iterable[tuple[str, Tensor]], sources: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names that readers have, without those that they do not.

    Raises:
        UserError: the checkpoint scales the cache of each layer, which a reader shares with another one.
    """
    readers = tuple(f".layers.{number}.self_attn." for number, source in enumerate(sources) if source != number)
    for name, weight in weights:
        if not any(reader in name for reader in readers):
            yield name, weight
        elif name.endswith((".k_scale", ".v_scale")):
            raise UserError(
                f"{name} scales a cache that this layer has not: checkpoints with scales for a quantized cache can be "
                f"served at full retention only; export one without"
            )
        elif not any(part in name for part in _UNUSED):
            yield name.replace(".q_proj.", f".{_QUERY}."), weight
