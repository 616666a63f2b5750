"""The decoder, top to bottom, or the slice of it that one pipeline stage holds.

What a donor hands over is what a cache would store: keys after norm and rotation, and values. A reader brings only
its query. Keys and values that nobody reads are not computed, yet their parameters get exact zero gradients, so
that the graph looks the same to every engine in every micro-batch.

Parameter names are those of transformers without the leading `model.`; they are the canonical names of
checkpoints, exports and initial draws.

Shapes: B batch, S sequence, D hidden, H heads, K key/value heads, E head_dim, L layers, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from skvr_dist.model.attention import Documents, attend, resolve_backend
from skvr_dist.model.config import ModelConfig
from skvr_dist.model.rope import rope_tables, rotate

KV = tuple[Tensor, Tensor]
"""Keys (after norm and rotation) and values of one layer, each [B, S, K, E]."""
Cache = dict[int, KV]
"""The keys and values of the retained layers, by layer."""


class Attention(nn.Module):
    """Grouped-query attention that reads its own keys and values or a donor's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_attention_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))

    def project_kv(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        """Keys and values as a cache stores them, from normed hidden states [B, S, D]."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        if self.config.qk_norm:
            k = self.k_norm(k)
        return rotate(k, *rope), v

    def kv_parameters(self) -> list[nn.Parameter]:
        """The parameters that only keys and values depend on."""
        modules = [self.k_proj, self.v_proj] + ([self.k_norm] if self.config.qk_norm else [])
        return [parameter for module in modules for parameter in module.parameters()]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], kv: KV, documents: Documents | None) -> Tensor:
        """Attend from normed hidden states x [B, S, D] to keys and values of T >= S positions; returns [B, S, D]."""
        q = self._heads(self.q_proj(x))
        if self.config.qk_norm:
            q = self.q_norm(q)
        backend = resolve_backend(self.config.attention, x.device, x.dtype)
        out = attend(rotate(q, *rope), *kv, backend=backend, documents=documents)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        donor: KV | None,
        own_is_read: bool,
        past: KV | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, KV | None]:
        """One layer.

        Donor keys and values come in and own ones go out as explicit tensors: nothing reaches another layer
        behind autograd's back, so the layer can be recomputed or cut off at a stage boundary.

        Args:
            hidden: [B, S, D].
            rope: cos and sin, each [S, E] or [B, S, E].
            donor: what this layer reads instead of its own keys and values; None reads its own.
            own_is_read: whether anyone reads this layer's own keys and values; if not, they are not computed.
            past: this layer's own keys and values of earlier positions, from a cache.
            documents: what each position is confined to; not with a cache.

        Returns:
            hidden states [B, S, D], and this layer's own keys and values if they are read.
        """
        x = self.input_layernorm(hidden)
        own: KV | None = None
        if own_is_read:
            k, v = self.self_attn.project_kv(x, rope)
            own = (k, v) if past is None else (torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1))
        elif torch.is_grad_enabled():
            x = zero_gradients(x, self.self_attn.kv_parameters())
        source = own if donor is None else donor
        assert source is not None, "a layer that reads its own keys and values must compute them"
        hidden = hidden + self.self_attn(x, rope, source, documents)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own


class Decoder(nn.Module):
    """Layers `start` to `stop` of a decoder; the embedding with the first, norm and head with the last.

    With tied embeddings the stage of the head holds the embedding matrix too (under the same name), and the head
    has no parameter of its own.
    """

    def __init__(self, config: ModelConfig, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.start = start
        self.stop = config.num_hidden_layers if stop is None else stop
        if self.has_embedding or (self.has_head and config.tie_word_embeddings):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Keyed by the layer's number in the whole decoder, so that names do not depend on the split.
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config) for i in range(self.start, self.stop)})
        if self.has_head:
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def has_embedding(self) -> bool:
        return self.start == 0

    @property
    def has_head(self) -> bool:
        return self.stop == self.config.num_hidden_layers

    def forward(
        self, tokens: Tensor, donors: Sequence[int], cache: Cache | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """The whole decoder: logits [B, S, V] for tokens, int [B, S].

        Args:
            donors: the layer that each of the L layers reads (`range(L)` is the standard decoder).
            cache: keys and values of the positions before these tokens, by layer; extended in place by those of these
                tokens. It holds the layers that `donors` reads and no others.
            documents: int [B, S], the document that each token belongs to and is confined to; None joins them. Not with
                a cache.
        """
        hidden = self.embed(tokens)
        hidden, _ = self.run_layers(hidden, donors, {}, cache, documents)
        return self.logits(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, S, D] of tokens, int [B, S]."""
        return self.embed_tokens(tokens)

    def run_layers(
        self,
        hidden: Tensor,
        donors: Sequence[int],
        crossing: Mapping[int, KV],
        cache: Cache | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, KV]]:
        """Run layers `start` to `stop`.

        Args:
            hidden: [B, S, D].
            donors: int [L], for the whole decoder.
            crossing: keys and values of earlier layers, received from the stage before, by layer.
            cache, documents: as for `forward`.

        Returns:
            hidden states [B, S, D], and the keys and values that are known after the last layer, by layer.
        """
        cache = {} if cache is None else cache
        past = cache[0][0].shape[1] if cache else 0
        within = None if documents is None else Documents(documents)
        positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)
        rope = rope_tables(self.config, positions if within is None else within.positions)
        read = set(donors)
        known = dict(crossing)
        for name, layer in self.layers.items():
            number = int(name)
            donor = None if donors[number] == number else known[donors[number]]
            hidden, own = layer(hidden, rope, donor, number in read, cache.get(number), within)
            if own is not None:
                known[number] = own
        cache.update(known)
        return hidden, known

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, S, V] of the last layer's hidden states [B, S, D]."""
        weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(self.norm(hidden), weight)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, in float32: logits [B, S, V] against labels, int [B, S].

    Labels of -100 are left out; if all are, the loss is 0.
    """
    total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


class _ZeroGradients(torch.autograd.Function):
    """Passes its first input through; the gradients of the others are zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        # A zero expanded to the parameter's shape costs no memory; accumulating it costs one addition.
        zeros = (p.new_zeros(()).expand_as(p) for p in ctx.parameters)  # type: ignore[attr-defined]
        return (grads[0], *zeros)


def zero_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """x, in a graph where `parameters` take part with a gradient of exactly zero.

    Engines that count or shard gradients (ZeRO, DDP) then meet the same parameters in every micro-batch, whatever
    the routing left out.
    """
    return _ZeroGradients.apply(x, *parameters)


@torch.no_grad()
def initialize(decoder: Decoder, seed: int) -> None:
    """Draw the initial weights: normal(0, initializer_range) matrices, unit norms, zero biases.

    Each parameter is drawn on its own, in float32 on the CPU, from a generator keyed by (seed, canonical name), so
    that any split of the decoder over ranks starts from the same weights.
    """
    for name, parameter in decoder.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
            drawn = torch.empty(parameter.shape).normal_(0.0, decoder.config.initializer_range, generator=generator)
            parameter.copy_(drawn)
