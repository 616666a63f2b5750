"""The model classes of each family of `skvr_dist.config.families`: transformers' own and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from skvr_dist.hf.model import causal_lm


@dataclass(frozen=True)
class FamilyClasses:
    """Causal language models of one family."""

    plain: Any
    """transformers' own."""
    routed: Any
    """Ours, at any cache strategy."""
    pruned: Any
    """Ours, for checkpoints that store the projections of some layers alone."""


CLASSES: dict[str, FamilyClasses] = {
    "qwen3": FamilyClasses(transformers.Qwen3ForCausalLM, causal_lm.Qwen3ForCausalLM, causal_lm.PrunedQwen3ForCausalLM),
    "qwen2": FamilyClasses(transformers.Qwen2ForCausalLM, causal_lm.Qwen2ForCausalLM, causal_lm.PrunedQwen2ForCausalLM),
    "llama": FamilyClasses(transformers.LlamaForCausalLM, causal_lm.LlamaForCausalLM, causal_lm.PrunedLlamaForCausalLM),
    "mistral": FamilyClasses(
        transformers.MistralForCausalLM, causal_lm.MistralForCausalLM, causal_lm.PrunedMistralForCausalLM
    ),
}
"""The classes by the name of the family."""
