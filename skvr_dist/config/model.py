"""The `model:` section: the shape of a decoder, in the field names of transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from skvr_dist.config.families import FAMILIES, Architecture
from skvr_dist.section import Section

AttentionName = Literal["auto", "fa4", "fa3", "fa2", "flash", "routed", "sdpa", "eager"]
FLASH_KERNELS: tuple[AttentionName, ...] = ("fa4", "fa3", "fa2")
"""The flash kernels among them, the fastest first; `flash` is any of them."""


class RopeScaling(Section):
    """Scaling of the rotary frequencies, as published in Hugging Face configurations."""

    rope_type: Literal["linear", "llama3"]
    """`linear` divides all frequencies by the factor; `llama3` only the low ones."""
    factor: float = Field(gt=0)
    """By how much positions are stretched."""
    low_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths above the original context over this are stretched in full."""
    high_freq_factor: float | None = Field(default=None, gt=0)
    """`llama3`: wavelengths below the original context over this are left alone."""
    original_max_position_embeddings: int | None = Field(default=None, gt=0, le=10**9)
    """`llama3`: the context that the frequencies were made for, in tokens."""

    @model_validator(mode="after")
    def _llama3_is_complete(self) -> RopeScaling:
        bands = (self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings)
        if self.rope_type == "llama3" and None in bands:
            raise ValueError(
                "rope_type llama3 needs low_freq_factor, high_freq_factor and original_max_position_embeddings"
            )
        if None not in bands and self.low_freq_factor >= self.high_freq_factor:  # type: ignore[operator]
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """A decoder-only transformer: enough for every family of `skvr_dist.config.families`."""

    architecture: Architecture
    """The Hugging Face family the model is published as (`skvr_dist.config.families`)."""
    vocab_size: int = Field(gt=0, le=10**8)
    """Tokens of the embedding and the output head, at least those of the tokenizer."""
    hidden_size: int = Field(gt=0, le=10**6)
    """Elements of a hidden state."""
    intermediate_size: int = Field(gt=0, le=10**7)
    """Elements inside the MLP."""
    num_hidden_layers: int = Field(gt=0, le=10_000)
    """L: decoder layers."""
    num_attention_heads: int = Field(gt=0, le=10**5)
    """Query heads of a layer."""
    num_key_value_heads: int = Field(gt=0, le=10**5)
    """Key/value heads of a layer, each shared by equally many query heads."""
    head_dim: int = Field(gt=0, le=10**5)
    """Elements of a head."""
    max_position_embeddings: int = Field(gt=0, le=10**9)
    """Longest sequence, in tokens."""
    rope_theta: float = Field(gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = Field(gt=0)
    """Epsilon of all RMSNorms."""
    qk_norm: bool
    """RMSNorm over each query and key head, before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases in the projections of attention, in those of them that have any in the family."""
    tie_word_embeddings: bool
    """Whether the output head is the embedding."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial matrices."""
    attention: AttentionName = "auto"
    """`auto`: `flash` on a GPU in bf16, else PyTorch's SDPA; where the sequences of a micro-batch have donors each and
    are short, `routed` on an H100 or H200 in bf16, if it is installed.

    `routed`: our kernel, of `pip install ./kernels`, in which every sequence reads a donor of its own.
    `fa4`, `fa3`, `fa2`: FlashAttention of that generation, and `flash` the newest of them that is there. FA2 is built
    into PyTorch; docs/attention.md says how to install the others. `eager`: the formula, for comparisons."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        family = FAMILIES[self.architecture]
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary position embeddings")
        if self.qk_norm != family.qk_norm:
            raise ValueError(
                f"qk_norm is {self.qk_norm}, but architecture {self.architecture} is published "
                f"{'with' if family.qk_norm else 'without'} query/key norms"
            )
        if family.head_dim == "heads divide hidden_size" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}: "
                f"transformers refuses any other {family.name}"
            )
        if family.head_dim == "hidden_size / heads" and self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim} times num_attention_heads {self.num_attention_heads} must be hidden_size "
                f"{self.hidden_size}: configurations of {family.name} have no head size of their own"
            )
        if family.attention_bias == "q, k and v" and not self.attention_bias:
            raise ValueError(
                f"attention_bias is false, but architecture {family.name} is published with biases of queries, keys "
                f"and values; set it to true"
            )
        if self.attention_bias and family.attention_bias == "never":
            raise ValueError(
                f"attention_bias is true, but architecture {family.name} has no attention biases; use llama"
            )
        return self

    @property
    def attention_output_bias(self) -> bool:
        """Whether the output projection of attention has a bias, as the others have with `attention_bias`."""
        return self.attention_bias and FAMILIES[self.architecture].attention_bias == "optional"

    @property
    def kv_size(self) -> int:
        """Elements of one layer's keys (or values) for one token."""
        return self.num_key_value_heads * self.head_dim
