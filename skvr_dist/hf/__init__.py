"""Hugging Face: import and export, and models of transformers whose layers share key/value caches.

Importing this package lets `AutoModelForCausalLM` load our exports at any cache strategy. Other checkpoints
of these families still become the classes of transformers, unless `kv_profile` or `kv_source_layers` is given.
"""

from skvr_dist.hf.model.auto import register
from skvr_dist.hf.model.causal_lm import LlamaForCausalLM as RoutedLlamaForCausalLM
from skvr_dist.hf.model.causal_lm import MistralForCausalLM as RoutedMistralForCausalLM
from skvr_dist.hf.model.causal_lm import Qwen2ForCausalLM as RoutedQwen2ForCausalLM
from skvr_dist.hf.model.causal_lm import Qwen3ForCausalLM as RoutedQwen3ForCausalLM
from skvr_dist.hf.model.rcla import disable_rcla, enable_rcla

__all__ = [
    "RoutedLlamaForCausalLM",
    "RoutedMistralForCausalLM",
    "RoutedQwen2ForCausalLM",
    "RoutedQwen3ForCausalLM",
    "disable_rcla",
    "enable_rcla",
]

register()
