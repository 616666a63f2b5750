"""Tensor parallelism: a decoder's linear layers and vocabulary split over ranks (Megatron-LM, arXiv 1909.08053).

Queries, keys, values, gate and up projections are split by their outputs, the projections that follow them by their
inputs, so each of attention and MLP costs one sum over the ranks. Keys and values stay on the rank of their head: a
donor inside a stage costs no communication. With fewer key/value heads than ranks, neighbouring ranks hold the same
head.

With sequence parallelism (arXiv 2205.05198) the hidden states between those regions are split by position: the sum
becomes a reduce-scatter and an all-gather, which together move the same bytes, and norms run on 1/T of the tokens.
Nothing but these 1/T is kept for the backward pass, which gathers once more.

A weight that several ranks hold, while each sees only part of its gradient: shared key/value heads sum theirs in the
backward pass itself; norms and biases are marked (`TensorShard.partial`), and the engine sums theirs once in a step.

Shapes: B batch, S sequence, D hidden, V vocabulary, T tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from skvr_dist.config.model import ModelConfig
from skvr_dist.model.loss import Losses, Objective, Rows, linear_loss
from skvr_dist.model.modules import Modules, TensorShard
from skvr_dist.parallel.collectives import GatherSequence, LinearsOfSequence, ScatterSequence, Sum, SumGradient
from skvr_dist.parallel.mesh import Mesh


class TensorParallelModules(Modules):
    """The modules that this rank of a tensor-parallel group holds."""

    def __init__(self, model: ModelConfig, mesh: Mesh, sequence_parallel: bool) -> None:
        self.mesh = mesh
        rows = -(-model.vocab_size // mesh.tp_size)
        self.tokens = range(mesh.tp_rank * rows, min((mesh.tp_rank + 1) * rows, model.vocab_size))
        """The tokens whose rows of the vocabulary matrices this rank holds."""
        self.vocabulary_rows = rows
        """Rows of such a matrix on every rank; the last rank's may be more than it has tokens."""
        self.sequence_parallel = sequence_parallel
        self.sequence_shards = mesh.tp_size if sequence_parallel else 1

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """This rank's 1/T of the outputs of a linear layer."""
        share = outputs // self.mesh.tp_size
        return ColumnLinear(inputs, outputs, self.mesh.tp_rank * share, share, bias)

    def kv_column(self, config: ModelConfig) -> nn.Module:
        """This rank's heads of keys or values; with fewer heads than ranks, the head it shares with its neighbours."""
        heads, ranks, rank = config.num_key_value_heads, self.mesh.tp_size, self.mesh.tp_rank
        start, count = rank * heads // ranks, max(heads // ranks, 1)
        return ColumnLinear(
            config.hidden_size,
            config.kv_size,
            start * config.head_dim,
            count * config.head_dim,
            config.attention_bias,
            copies=self.mesh.kv_group,
            primary=rank % max(ranks // heads, 1) == 0,
        )

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """This rank's 1/T of the inputs of a linear layer."""
        return RowLinear(inputs, outputs, bias, self)

    def norm(self, size: int, eps: float) -> nn.Module:
        """A norm of hidden states: whole on every rank, or of this rank's positions."""
        return ReplicatedNorm(size, eps, self, partial=self.sequence_parallel)

    def head_norm(self, size: int, eps: float) -> nn.Module:
        """A norm of this rank's heads."""
        return ReplicatedNorm(size, eps, self, partial=True)

    def vocabulary(self, config: ModelConfig) -> nn.Module:
        """This rank's rows of the embedding or of the output head."""
        return VocabularyShard(config, self)

    def enter(self, x: Tensor) -> Tensor:
        """Let the gradient of hidden states be summed over the ranks; those split by position stay as they are."""
        return x if self.sequence_parallel else SumGradient.apply(x, self.mesh.tp_group)

    def project(self, x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
        """What `column` layers make of hidden states [B, S, D]; of those split by position, once they are gathered."""
        if not self.sequence_parallel:
            return super().project(x, linears)
        used = [each for linear in linears for each in cast(ColumnLinear, linear).weight_and_bias()]
        return LinearsOfSequence.apply(x, self.mesh.tp_group, *used)

    def enter_head(self, x: Tensor) -> Tensor:
        """Gather hidden states to [B, S, D] if they are split by position; their gradient is summed over the ranks."""
        return GatherSequence.apply(x, self.mesh.tp_group) if self.sequence_parallel else self.enter(x)

    def leave(self, x: Tensor) -> Tensor:
        """Sum partial hidden states [B, S, D] over the ranks; with sequence parallelism each gets its positions."""
        group = self.mesh.tp_group
        return ScatterSequence.apply(x, group) if self.sequence_parallel else Sum.apply(x, group)


class ColumnLinear(nn.Linear):
    """The outputs `start` to `start + share` of a linear layer.

    Args:
        copies: the ranks that hold the same outputs, when there are several.
        primary: whether this rank is the first of them.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        start: int,
        share: int,
        bias: bool,
        copies: dist.ProcessGroup | None = None,
        primary: bool = True,
    ) -> None:
        super().__init__(inputs, share, bias=bias)
        self.copies = copies
        self.shards = {
            "weight": TensorShard((outputs, inputs), 0, start, share, primary),
            "bias": TensorShard((outputs,), 0, start, share, primary),
        }

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.weight_and_bias())

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """What inputs are multiplied by, and what is added to that."""
        if self.copies is None:
            return self.weight, self.bias
        # Each copy serves the query heads of its own rank, and so sees only their share of the gradient.
        bias = None if self.bias is None else SumGradient.apply(self.bias, self.copies)
        return SumGradient.apply(self.weight, self.copies), bias


class RowLinear(nn.Linear):
    """This rank's inputs of a linear layer; the partial outputs are summed over the ranks."""

    def __init__(self, inputs: int, outputs: int, bias: bool, modules: TensorParallelModules) -> None:
        share, rank = inputs // modules.mesh.tp_size, modules.mesh.tp_rank
        super().__init__(share, outputs, bias=bias)
        self.module_set = modules
        # With sequence parallelism each rank adds the bias to its own positions only.
        partial = modules.sequence_parallel
        self.shards = {
            "weight": TensorShard((outputs, inputs), 1, rank * share, share),
            "bias": TensorShard((outputs,), 0, 0, outputs, primary=rank == 0, partial=partial),
        }

    def forward(self, x: Tensor) -> Tensor:
        out = self.module_set.leave(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class ReplicatedNorm(nn.RMSNorm):
    """A norm whose weight every rank holds: of the same inputs, or (`partial`) of its own positions or heads."""

    def __init__(self, size: int, eps: float, modules: TensorParallelModules, partial: bool) -> None:
        super().__init__(size, eps=eps)
        primary = modules.mesh.tp_rank == 0
        self.shards = {"weight": TensorShard((size,), 0, 0, size, primary=primary, partial=partial)}


class VocabularyShard(nn.Module):
    """This rank's rows of the matrix [V, D] between tokens and hidden states.

    Every rank holds ceil(V / T) rows; the last ones of the last rank may be padding, which no token selects and no
    logit uses.
    """

    loss_backend: str | None = None
    """As that of `skvr_dist.model.modules.Vocabulary`."""

    def __init__(self, config: ModelConfig, modules: TensorParallelModules) -> None:
        super().__init__()
        self.module_set = modules
        self.tokens = modules.tokens
        self.weight = nn.Parameter(torch.empty(modules.vocabulary_rows, config.hidden_size))
        whole = (config.vocab_size, config.hidden_size)
        self.shards = {"weight": TensorShard(whole, 0, self.tokens.start, len(self.tokens))}

    def forward(self, x: Tensor, predict: bool = False, objective: Objective | None = None) -> Tensor | Losses:
        """As `skvr_dist.model.modules.Vocabulary` has it; logits are those of this rank's tokens, losses are whole."""
        rows = Rows(self.tokens, self.module_set.mesh.tp_group)
        if objective is not None:
            return linear_loss(x, self.weight, objective, rows, self.loss_backend)
        if predict:
            return F.linear(x, self.weight[: len(self.tokens)])
        local, elsewhere = rows.local(x)
        embedded = F.embedding(local, self.weight)
        return self.module_set.leave(embedded.masked_fill(elsewhere[..., None], 0.0))
