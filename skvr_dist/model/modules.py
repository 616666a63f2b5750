"""What a decoder is built from, and which part of each whole weight a built decoder holds.

`Modules` makes plain modules that hold whole weights. `skvr_dist.parallel.tensor.TensorParallelModules` makes their
tensor-parallel counterparts; the decoder is the same in both.

Shapes: B batch, S sequence, D hidden, K key/value heads, E head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skvr_dist.config.model import ModelConfig
from skvr_dist.model.loss import IGNORED, Losses, Objective, linear_loss


def count_labels(labels: Tensor) -> Tensor:
    """How many labels are to be predicted, int64 []."""
    return (labels != IGNORED).sum()


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats of each token, float32 [B * S], of logits [B, S, V] against labels, int [B, S].

    It is 0 where the label is `IGNORED`.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")


@dataclass(frozen=True)
class TensorShard:
    """The part of a whole weight that a parameter holds: `length` entries from `start` along `dim`.

    The parameter may be longer along `dim` (the last shard of a padded vocabulary); what is left over is zero and
    stays zero.
    """

    shape: tuple[int, ...]
    """Shape of the whole weight."""
    dim: int
    start: int
    length: int
    primary: bool = True
    """Whether this rank stands for the shard where several hold the same one: in norms and in checkpoints."""
    partial: bool = False
    """Whether a backward pass leaves only this rank's part of the gradient, of its own heads or positions: the sum over
    the tensor-parallel ranks, which all hold this shard, is left to the end of the step."""

    @classmethod
    def whole(cls, shape: torch.Size, primary: bool = True) -> TensorShard:
        """The shard that is the whole weight."""
        return cls(tuple(shape), 0, 0, shape[0], primary)

    def cut(self, weight: Tensor) -> Tensor:
        """This shard of the whole weight, without padding."""
        return weight.narrow(self.dim, self.start, self.length)

    def unpadded(self, parameter: Tensor) -> Tensor:
        """The parameter without its padding."""
        return parameter.narrow(self.dim, 0, self.length)


class Vocabulary(nn.Module):
    """The matrix [V, D] between tokens and hidden states, as an embedding or as the output head."""

    loss_backend: str | None = None
    """What compiles the loss (`skvr_dist.model.loss.linear_loss`); None: nothing does."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, x: Tensor, predict: bool = False, objective: Objective | None = None) -> Tensor | Losses:
        """Hidden states [B, S, D] of tokens x, int [B, S].

        To `predict`: the logits [B, S, V] of hidden states x, or, with an objective, their losses.
        """
        if objective is not None:
            return linear_loss(x, self.weight, objective, backend=self.loss_backend)
        return F.linear(x, self.weight) if predict else F.embedding(x, self.weight)


class Modules:
    """Modules that hold whole weights."""

    sequence_shards = 1
    """Ranks that share the sequence of the hidden states between layers."""

    def column(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A linear layer whose outputs may be split over ranks."""
        return nn.Linear(inputs, outputs, bias=bias)

    def kv_column(self, config: ModelConfig) -> nn.Module:
        """A linear layer that makes keys or values [B, S, K * E], split by head."""
        return nn.Linear(config.hidden_size, config.kv_size, bias=config.attention_bias)

    def row(self, inputs: int, outputs: int, bias: bool) -> nn.Module:
        """A linear layer that takes what `column` made; its outputs are whole."""
        return nn.Linear(inputs, outputs, bias=bias)

    def norm(self, size: int, eps: float) -> nn.Module:
        """A norm of whole hidden states."""
        return nn.RMSNorm(size, eps=eps)

    def head_norm(self, size: int, eps: float) -> nn.Module:
        """A norm of every head."""
        return nn.RMSNorm(size, eps=eps)

    def vocabulary(self, config: ModelConfig) -> nn.Module:
        """The embedding or the output head."""
        return Vocabulary(config.vocab_size, config.hidden_size)

    def enter(self, x: Tensor) -> Tensor:
        """Prepare normed hidden states for `project`."""
        return x

    def project(self, x: Tensor, linears: Sequence[nn.Module]) -> Sequence[Tensor]:
        """What several `column` layers make of the same hidden states; tensor-parallel modules may gather these here.

        Gradients of the hidden states are added up from the last layer to the first.
        """
        return [linear(x) for linear in linears]

    def enter_head(self, x: Tensor) -> Tensor:
        """Prepare normed hidden states for the output head, which takes whole ones."""
        return x


def shards_of(module: nn.Module) -> dict[str, TensorShard]:
    """The shard that each parameter of a decoder (or of a part of it) holds, by canonical name.

    A module that holds shards says so in its attribute `shards`, by the name of the parameter.
    """
    return {
        f"{path}.{name}" if path else name: getattr(child, "shards", {}).get(name) or TensorShard.whole(parameter.shape)
        for path, child in module.named_modules()
        for name, parameter in child.named_parameters(recurse=False)
    }
