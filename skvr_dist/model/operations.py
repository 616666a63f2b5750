"""How many floating-point operations a decoder's forward pass takes, in closed forms: one count for runs and estimates.

Multiplications and additions of matrix products count one each; norms, rotations, activations, softmax and looking up
embeddings are left out, as is usual for model FLOPs utilisation (Chowdhery et al., 2022, "PaLM", appendix B). The
backward pass takes as many for the gradients of the inputs and again as many for those of the weights.

Shapes: T tokens, S sequence length, D hidden, I intermediate, H heads, K key/value heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from skvr_dist.config.model import ModelConfig


@dataclass(frozen=True)
class Widths:
    """Sizes of the matrices that are multiplied by: the model's, or one tensor-parallel rank's shards of them."""

    hidden: int
    """D."""
    queries: int
    """H x E."""
    kv: int
    """K x E: the keys, or the values, of one layer for one token."""
    inner: int
    """I."""
    vocabulary: int
    """V."""

    @classmethod
    def of(cls, model: ModelConfig) -> Widths:
        """Those of a whole decoder."""
        return cls(
            model.hidden_size,
            model.num_attention_heads * model.head_dim,
            model.num_key_value_heads * model.head_dim,
            model.intermediate_size,
            model.vocab_size,
        )


@dataclass(frozen=True)
class LayerOperations:
    """Operations of one layer's forward pass on T tokens, by the module that does them."""

    projections: dict[str, int]
    """Of every matrix but those of keys and values, by the name of its module within the layer."""
    kv: dict[str, int]
    """Of the projections to keys and values, which are left out where nobody reads them."""
    scores: int
    """Queries times keys, and probabilities times values, between every two positions of a sequence.

    A causal kernel computes half of it: a position attends to those before it."""


def layer_operations(widths: Widths, tokens: int, sequence_length: int) -> LayerOperations:
    """Operations of one layer's forward pass.

    Args:
        tokens: T.
        sequence_length: S, positions that each token's attention is over.
    """
    of_one_column = 2 * tokens * widths.hidden
    outputs = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), widths.queries)
    outputs |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), widths.inner)
    return LayerOperations(
        projections={name: of_one_column * size for name, size in outputs.items()},
        kv=dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), of_one_column * widths.kv),
        scores=2 * 2 * tokens * widths.queries * sequence_length,
    )


def head_operations(widths: Widths, tokens: int) -> int:
    """Operations of the output head's forward pass on `tokens` tokens."""
    return 2 * tokens * widths.hidden * widths.vocabulary
