"""The decoder, top to bottom, or the slice of it that one pipeline stage holds.

What a donor hands over is what a cache would store: keys after norm and rotation, and values. A reader brings only
its query. Keys and values that nobody reads are not computed, yet their parameters get exact zero gradients, so
that the graph looks the same to every engine in every micro-batch.

Linear layers, norms and vocabulary come from `Modules`. Tensor-parallel ones split the heads, the intermediate size
and the vocabulary over ranks, and perhaps the sequence between layers; H, K and V below are then this rank's share.

Parameter names are those of transformers without the leading `model.`; they are the canonical names of
checkpoints, exports and initial draws.

A micro-batch has R rows of donors: one for all of its sequences, or one for each. Where there are several, attention
runs once for each on views of queries, keys and values, or once in all from an arena (`skvr_dist.model.arena`);
everything else runs on the whole micro-batch, a layer's own keys and values too, which are computed if any row reads
them.

Shapes: B batch, R rows of donors, S sequence, D hidden, H heads, K key/value heads, E head_dim, L layers, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from skvr_dist.config.model import FLASH_KERNELS, ModelConfig
from skvr_dist.config.parallel import ActivationCheckpointing
from skvr_dist.model import recompute
from skvr_dist.model.arena import ArenaGradients, ArenaLayer, StageArena
from skvr_dist.model.attention import AttentionScope, attend, scopes_of
from skvr_dist.model.attention_choice import activate, resolve, takes_arena
from skvr_dist.model.documents import Documents
from skvr_dist.model.modules import Modules, TensorShard, count_labels, shards_of, token_cross_entropy
from skvr_dist.model.rope import rope_tables, rotate
from skvr_dist.routing import KVPart


@dataclass(frozen=True, eq=False)
class KV:
    """Keys (after norm and rotation) and values of one layer, each [B, S, K, E], or of the sequences of a row.

    Not a tuple: ZeRO-3 looks for tensors in what a module takes and returns, and counts them to know when to fetch the
    module's parameters. With keys and values among them the count would depend on the routing, and the replicas would
    fetch in different orders.
    """

    k: Tensor
    v: Tensor

    def after(self, past: KV | None) -> KV:
        """These keys and values appended to those of earlier positions."""
        return self if past is None else KV(torch.cat((past.k, self.k), dim=1), torch.cat((past.v, self.v), dim=1))

    def rows(self, count: int) -> tuple[KV, ...]:
        """These of each row of `count`, as views; themselves if there is but one."""
        if count == 1:
            return (self,)
        return tuple(map(KV, self.k.chunk(count), self.v.chunk(count)))


Cache = dict[int, KV]
"""The keys and values of the retained layers, by layer."""


class Attention(nn.Module):
    """Grouped-query attention that reads its own keys and values or donors'."""

    def __init__(self, config: ModelConfig, modules: Modules) -> None:
        super().__init__()
        self.config = config
        self.module_set = modules
        query_size = config.num_attention_heads * config.head_dim
        self.q_proj = modules.column(config.hidden_size, query_size, config.attention_bias)
        self.k_proj = modules.kv_column(config)
        self.v_proj = modules.kv_column(config)
        self.o_proj = modules.row(query_size, config.hidden_size, config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = modules.head_norm(config.head_dim, config.rms_norm_eps)
            self.k_norm = modules.head_norm(config.head_dim, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], *, queries: bool, kv: bool
    ) -> tuple[Tensor | None, KV | None]:
        """Queries [B, S, H, E], and keys and values as a cache stores them, of normed hidden states [B, S, D].

        Args:
            queries, kv: whether they are wanted.
        """
        linears = [*((self.k_proj, self.v_proj) if kv else ()), *((self.q_proj,) if queries else ())]
        if not linears:
            return None, None
        heads = [self._heads(each) for each in self.module_set.project(x, linears)]
        q = self._queries(heads[-1], rope) if queries else None
        return q, self._kv(heads[0], heads[1], rope) if kv else None

    def _queries(self, q: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(self.q_norm(q) if self.config.qk_norm else q, *rope)

    def _kv(self, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> KV:
        return KV(rotate(self.k_norm(k) if self.config.qk_norm else k, *rope), v)

    def kv_parameters(self) -> list[nn.Parameter]:
        """The parameters that only keys and values depend on."""
        modules = [self.k_proj, self.v_proj] + ([self.k_norm] if self.config.qk_norm else [])
        return [parameter for module in modules for parameter in module.parameters()]

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Queries [B, S, H, E] of normed hidden states [B, S, D]."""
        q, _ = self.project(x, rope, queries=True, kv=False)
        assert q is not None
        return q

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        sources: Sequence[KV] | ArenaLayer,
        scopes: Sequence[AttentionScope],
    ) -> Tensor:
        """Attend from normed hidden states x [B, S, D]; returns [B, S, D].

        Args:
            sources, scopes: as for `attend`.
        """
        return self.attend(self.queries(x, rope), sources, scopes)

    def attend(self, q: Tensor, sources: Sequence[KV] | ArenaLayer, scopes: Sequence[AttentionScope]) -> Tensor:
        """Attend from queries [B, S, H, E]; returns [B, S, D].

        Args:
            sources: the keys and values that each of the R rows reads, of T >= S positions; or the arena they are in.
            scopes: what each row is confined to, and what computes it; the arena knows.
        """
        if isinstance(sources, ArenaLayer):
            return self.o_proj(sources.attend(q).flatten(2))
        rows = zip(q.chunk(len(sources)) if len(sources) > 1 else (q,), sources, scopes, strict=True)
        out = [attend(part, kv.k, kv.v, scope) for part, kv, scope in rows]
        return self.o_proj((out[0] if len(out) == 1 else torch.cat(out)).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, modules: Modules) -> None:
        super().__init__()
        self.module_set = modules
        self.gate_proj = modules.column(config.hidden_size, config.intermediate_size, False)
        self.up_proj = modules.column(config.hidden_size, config.intermediate_size, False)
        self.down_proj = modules.row(config.intermediate_size, config.hidden_size, False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.module_set.project(x, (self.gate_proj, self.up_proj))
        inner = F.silu(gate)
        del gate  # nothing else holds it where no gradient is wanted, or this is computed again
        inner = inner * up
        del up
        return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: ModelConfig, modules: Modules, recompute_attention: bool = False) -> None:
        super().__init__()
        self.module_set = modules
        self.recompute_attention = recompute_attention
        self.input_layernorm = modules.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, modules)
        self.post_attention_layernorm = modules.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, modules)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        donors: Sequence[KV | None] | ArenaLayer,
        own_is_read: bool,
        past: KV | None,
        scopes: Sequence[AttentionScope],
        hands_out: bool = True,
    ) -> tuple[Tensor, tuple[KV, ...]]:
        """One layer.

        Donor keys and values come in and own ones go out as explicit tensors: nothing reaches another layer
        behind autograd's back, so the layer can be recomputed or cut off at a stage boundary.

        Args:
            hidden: [B, S, D].
            rope: cos and sin, each [S, E] or [B, S, E].
            donors: what each of the R rows reads instead of this layer's own keys and values, None if it reads its own;
                or the arena that they are all in.
            own_is_read: whether any row reads this layer's own keys and values; if not, they are not computed.
            past: this layer's own keys and values of earlier positions, from a cache; with one row.
            scopes: what each row is confined to, nothing with a cache; and what computes it.
            hands_out: whether another layer may read this layer's own keys and values.

        Returns:
            hidden states [B, S, D], and this layer's own keys and values, by row, if they are read and handed out.
        """
        x, q, own = self.before_attention(hidden, rope, own_is_read, past)
        sources: Sequence[KV] | ArenaLayer
        if isinstance(donors, ArenaLayer):
            rows = donors.keep(own) if own is not None else ()
            sources = donors
        else:
            rows = own.rows(len(donors)) if own is not None else ()
            sources = [rows[row] if donor is None else donor for row, donor in enumerate(donors)]
        if q is None:
            attended = recompute.run(self.self_attn, x, rope, sources, scopes, again=True)
        else:
            attended = self.self_attn.attend(q, sources, scopes)
        del x, q  # nothing else holds them where no gradient is wanted, or this layer is computed again
        return self.after_attention(hidden, attended), rows if hands_out else ()

    def before_attention(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], own_is_read: bool, past: KV | None
    ) -> tuple[Tensor, Tensor | None, KV | None]:
        """What attention sees of hidden states [B, S, D]: those normed, queries if they are not computed again in the
        backward pass, and this layer's own keys and values if they are read."""
        x = self.module_set.enter(self.input_layernorm(hidden))
        if not own_is_read and torch.is_grad_enabled():
            x = zero_gradients(x, self.self_attn.kv_parameters())
        q, own = self.self_attn.project(x, rope, queries=not self.recompute_attention, kv=own_is_read)
        return x, q, own if own is None else own.after(past)

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output of its input and of what attention made of it, each [B, S, D]."""
        hidden = hidden + attended
        return hidden + self.mlp(self.module_set.enter(self.post_attention_layernorm(hidden)))


class Decoder(nn.Module):
    """Layers `start` to `stop` of a decoder; the embedding with the first, norm and head with the last.

    With tied embeddings the stage of the head holds the embedding matrix too (under the same name), and the head
    has no parameter of its own.

    Args:
        modules: what the layers are made of.
        checkpointing: what is computed again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        start: int = 0,
        stop: int | None = None,
        *,
        modules: Modules | None = None,
        checkpointing: ActivationCheckpointing | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.start = start
        self.stop = config.num_hidden_layers if stop is None else stop
        self.module_set = modules or Modules()
        self.checkpointing = checkpointing or ActivationCheckpointing()
        self._arena_gradients = ArenaGradients()
        if self.has_embedding or (self.has_head and config.tie_word_embeddings):
            self.embed_tokens = self.module_set.vocabulary(config)
        # Keyed by the layer's number in the whole decoder, so that names do not depend on the split.
        self.layers = nn.ModuleDict(
            {
                str(i): DecoderLayer(config, self.module_set, self.checkpointing.covers("attention", i))
                for i in range(self.start, self.stop)
            }
        )
        if self.has_head:
            self.norm = self.module_set.norm(config.hidden_size, config.rms_norm_eps)
            if not config.tie_word_embeddings:
                self.lm_head = self.module_set.vocabulary(config)

    @property
    def has_embedding(self) -> bool:
        """Whether this slice begins with the embedding."""
        return self.start == 0

    @property
    def has_head(self) -> bool:
        """Whether this slice ends with the norm and the output head."""
        return self.stop == self.config.num_hidden_layers

    def forward(
        self,
        tokens: Tensor,
        donors: Sequence[int],
        cache: Cache | None = None,
        documents: Tensor | Documents | None = None,
    ) -> Tensor:
        """The whole decoder: logits [B, S, V] for tokens, int [B, S].

        Args:
            donors: the layer that each of the L layers reads (`range(L)` is the standard decoder).
            cache: keys and values of the positions before these tokens, by layer; extended in place by those of these
                tokens. It holds the layers that `donors` reads and no others.
            documents: those that tokens are confined to: int [B, S], the document of each token, or what was made of
                it and is on the device already, without which the host waits for the device. None joins them. Not with
                a cache.
        """
        hidden = self.embed(tokens)
        hidden, _ = self.run_layers(hidden, [donors], {}, cache, documents)
        return self.logits(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, S, D] of tokens, int [B, S]."""
        return self.embed_tokens(tokens)

    def run_layers(
        self,
        hidden: Tensor,
        donors: Sequence[Sequence[int]],
        crossing: Mapping[KVPart, KV],
        cache: Cache | None = None,
        documents: Tensor | Documents | None = None,
    ) -> tuple[Tensor, dict[KVPart, KV]]:
        """Run layers `start` to `stop`.

        Args:
            hidden: [B, S, D].
            donors: int [R][L], for the whole decoder.
            crossing: keys and values of earlier layers, received from the stage before.
            cache, documents: as for `forward`; a cache only with one row.

        Returns:
            hidden states [B, S, D], and the keys and values that are known after the last layer; no more than those
            received in a pass with gradients in which each layer reads itself.
        """
        if isinstance(documents, Tensor):
            documents = Documents.of(documents, len(donors)).to(hidden.device)
        arena = self._arena(hidden, donors, crossing, cache, documents)
        rope, scopes = self.surroundings(hidden, documents, cache, rows=len(donors), in_arena=arena is not None)
        cache = {} if cache is None else cache
        read = {donor for row in donors for donor in row}
        # A compiled layer makes zeros for the gradients of keys and values that it hands out to nobody.
        is_routed = any(donor != layer for row in donors for layer, donor in enumerate(row))
        hands_out = is_routed or bool(cache) or not torch.is_grad_enabled()
        known = dict(crossing)
        for name, layer in self.layers.items():
            number = int(name)
            given: Sequence[KV | None] | ArenaLayer
            if arena:
                given = arena.layer(number)
            else:
                given = [None if row[number] == number else known[row[number], r] for r, row in enumerate(donors)]
            hidden, own = recompute.run(
                layer,
                hidden,
                rope,
                given,
                number in read,
                cache.get(number),
                scopes,
                hands_out,
                again=self.checkpointing.covers("layer", number),
            )
            known.update({(number, row): kv for row, kv in enumerate(own)})
        if arena:
            arena.close()
        cache.update({number: kv for (number, _), kv in known.items()})
        return hidden, known

    def _arena(
        self,
        hidden: Tensor,
        donors: Sequence[Sequence[int]],
        crossing: Mapping[KVPart, KV],
        cache: Cache | None,
        documents: Documents | None,
    ) -> StageArena | None:
        """Where layers leave what later ones read, if our kernel computes attention; arguments as for `run_layers`."""
        sequence = hidden.shape[1] * self.module_set.sequence_shards
        if cache is not None or not takes_arena(
            self.config.attention, hidden.device, hidden.dtype, self.config.head_dim, sequence, len(donors)
        ):
            return None
        layers = range(self.start, self.stop)
        arena = StageArena(layers, donors, hidden.shape[0], hidden.device, documents, self._arena_gradients)
        arena.receive(crossing)
        return arena

    def surroundings(
        self,
        hidden: Tensor,
        documents: Documents | None,
        cache: Cache | None = None,
        rows: int = 1,
        in_arena: bool = False,
    ) -> tuple[tuple[Tensor, Tensor], list[AttentionScope]]:
        """What all layers take beside the hidden states [B, S, D]: the rotation's tables, the scope of each row.

        Args:
            documents: those that tokens are confined to, on the device.
            cache: as for `forward`.
            rows: R.
            in_arena: whether attention reads from an arena, which knows the scopes itself; then there are none.
        """
        if documents is None:
            past = cache[0].k.shape[1] if cache else 0
            new = hidden.shape[1] * self.module_set.sequence_shards
            positions = torch.arange(past, past + new, device=hidden.device)
        else:
            positions = documents.positions
        rope = rope_tables(self.config, positions)
        if in_arena:
            return rope, []
        wanted = "auto" if self.config.attention == "routed" else self.config.attention
        backend = resolve(wanted, hidden.device, hidden.dtype, self.config.head_dim).name
        if cache is not None and backend in FLASH_KERNELS:
            backend = "sdpa"  # mostly single queries, of evaluations, and more keys than queries
        activate(backend)
        return rope, scopes_of(backend, documents, rows)

    @property
    def head(self) -> nn.Module:
        """The output head: with tied embeddings the embedding."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def final(self, hidden: Tensor) -> Tensor:
        """What the head sees [B, S, D] of the last layer's hidden states [B, S, D]."""
        return self.module_set.enter_head(self.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [B, S, V] of the last layer's hidden states [B, S, D]."""
        return self.head(self.final(hidden), predict=True)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats per token, in float32: whole logits [B, S, V] against labels, int [B, S].

    0 where all labels are `IGNORED`. Means of several batches are not to be averaged: they may differ in their tokens.
    """
    return token_cross_entropy(logits, labels).sum() / count_labels(labels).clamp(min=1)


class _ZeroGradients(torch.autograd.Function):
    """Passes its first input through; the gradients of the others are zeros."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *parameters: Tensor) -> Tensor:
        # Not the parameters themselves: ZeRO-3 may have taken their contents away by the backward pass.
        ctx.zero = parameters[0].new_zeros(())  # type: ignore[attr-defined]
        ctx.shapes = [parameter.shape for parameter in parameters]  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        # A zero expanded to the parameter's shape costs no memory; accumulating it costs one addition.
        zeros = (ctx.zero.expand(shape) for shape in ctx.shapes)  # type: ignore[attr-defined]
        return (grads[0], *zeros)


def zero_gradients(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """x, in a graph where `parameters` take part with a gradient of exactly zero.

    Engines that count or shard gradients (ZeRO, DDP) then meet the same parameters in every micro-batch, whatever
    the routing left out.
    """
    return _ZeroGradients.apply(x, *parameters)


@torch.no_grad()
def initialize(
    decoder: Decoder,
    seed: int,
    device: torch.device | str = "cpu",
    take: Callable[[nn.Module], None] | None = None,
) -> None:
    """Draw the initial weights: normal(0, initializer_range) matrices, unit norms, zero biases.

    Each weight is drawn on its own and whole, in float32 on the CPU, from a generator keyed by (seed, canonical name),
    and then cut, so that any split of the decoder over ranks starts from the same weights. A decoder on the meta device
    comes into being here, module by module: beside it there is never more than the one weight that is being drawn.

    Args:
        device: where modules that are on the meta device get their weights.
        take: called with every module that has weights of its own as soon as they are drawn, in the order of the
            decoder; with ZeRO-3 it leaves this rank a part of them.
    """
    shards = shards_of(decoder)
    for path, module in decoder.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
        for name, parameter in module.named_parameters(recurse=False):
            _draw(f"{path}.{name}", parameter, shards[f"{path}.{name}"], decoder.config.initializer_range, seed)
        if take:
            take(module)


def _draw(name: str, parameter: nn.Parameter, shard: TensorShard, deviation: float, seed: int) -> None:
    """Give a parameter its initial weights.

    Args:
        name: the canonical one.
        deviation: the standard deviation of matrices.
    """
    if name.endswith(".bias"):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        drawn = torch.empty(shard.shape).normal_(0.0, deviation, generator=generator)
        parameter.zero_()  # what pads a shard
        shard.unpadded(parameter).copy_(shard.cut(drawn))
