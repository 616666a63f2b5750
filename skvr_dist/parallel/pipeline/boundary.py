"""What crosses a stage boundary: one packed tensor per micro-batch, whose size both sides know from the plan.

The packed tensor is flat: hidden states, then the keys and values that cross, by layer and by row of donors, in
ascending order. Its
gradient comes back in the same form. Neither needs a handshake about shapes.

Each tensor-parallel rank sends to its counterpart: its own heads of keys and values, and 1/T of the hidden states,
which the receiving ranks gather. So no byte crosses twice.

Shapes: B batch, R rows of donors of a micro-batch, S sequence, D hidden, K this rank's key/value heads, E head_dim,
N elements of the packed tensor, T tensor-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skvr_dist.config.model import ModelConfig
from skvr_dist.model.decoder import KV
from skvr_dist.parallel.collectives import gather
from skvr_dist.parallel.mesh import Mesh, new_groups
from skvr_dist.parallel.pipeline.channel import Channel
from skvr_dist.routing import KVPart


@dataclass(frozen=True, eq=False)
class Handover:
    """What a stage hands to the next one for one micro-batch, or the gradients of it.

    Not a tuple: like `skvr_dist.model.decoder.KV`, it must hide its tensors from ZeRO-3, which would count them.
    """

    hidden: Tensor
    """[B, S, D]; with sequence parallelism [B, S / T, D]."""
    kv: dict[KVPart, KV]
    """The keys and values that cross, each [B / R, S, K, E], in ascending order."""

    def tensors(self) -> list[Tensor]:
        """Hidden states, then keys and values of each part."""
        return [self.hidden, *(tensor for kv in self.kv.values() for tensor in (kv.k, kv.v))]


@dataclass(frozen=True)
class MicroBatchShape:
    """The sizes that, with the plan, fix the shape of everything that crosses."""

    batch: int
    sequence: int
    sequence_parallel: bool


@dataclass(frozen=True)
class HandoverFormat:
    """How a `Handover` is packed into one tensor: the same at every boundary."""

    model: ModelConfig
    mesh: Mesh
    shape: MicroBatchShape
    rows: int = 1
    """R."""

    def elements(self, crossing: Sequence[KVPart]) -> int:
        """N, the liveness bound of this rank.

        Args:
            crossing: the keys and values that cross, ascending.
        """
        return sum(math.prod(shape) for shape in self._shapes(len(crossing)))

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """One flat tensor [N] of the tensors of a `Handover`, or of their gradients; not part of any graph."""
        hidden, *kv = (part.detach() for part in parts)
        if self._hidden_is_split_for_sending:
            hidden = hidden.flatten().chunk(self.mesh.tp_size)[self.mesh.tp_rank]
        return torch.cat([part.flatten() for part in (hidden, *kv)])

    def unpack(self, packed: Tensor, crossing: Sequence[KVPart]) -> Handover:
        """The parts of a packed tensor [N]; all but perhaps the hidden states are views of it.

        Args:
            crossing: the keys and values that cross, ascending.
        """
        shapes = self._shapes(len(crossing))
        flat = packed.split([math.prod(shape) for shape in shapes])
        hidden, *kv = (part.view(shape) for part, shape in zip(flat, shapes, strict=True))
        if self._hidden_is_split_for_sending:
            hidden = gather(hidden, self.mesh.tp_group)
            hidden = hidden.view(self.shape.batch, self.shape.sequence, self.model.hidden_size)
        pairs = zip(crossing, kv[0::2], kv[1::2], strict=True)
        return Handover(hidden, {part: KV(k, v) for part, k, v in pairs})

    @property
    def _hidden_is_split_for_sending(self) -> bool:
        """Without sequence parallelism all tensor-parallel ranks hold the same hidden states and gradients of them."""
        return self.mesh.tp_size > 1 and not self.shape.sequence_parallel

    def _shapes(self, parts: int) -> list[tuple[int, ...]]:
        """Shapes of what is sent, with that many parts of keys and values."""
        ranks, hidden_size = self.mesh.tp_size, self.model.hidden_size
        batch, sequence = self.shape.batch, self.shape.sequence
        heads = max(self.model.num_key_value_heads // ranks, 1)
        kv = (batch // self.rows, sequence, heads, self.model.head_dim)
        flat = (batch * sequence * hidden_size // ranks,)
        hidden = flat if self._hidden_is_split_for_sending else (batch, sequence // ranks, hidden_size)
        return [hidden, *([kv] * (2 * parts))]


@dataclass(frozen=True)
class Link:
    """The two channels of one boundary: activations forwards, gradients backwards."""

    activations: Channel
    gradients: Channel


def connect(mesh: Mesh, dtype: torch.dtype, device: torch.device) -> tuple[Link | None, Link | None]:
    """This stage's links to the stages before and after it; collective over all ranks."""
    # Making a channel waits for the rank at its other end, and making a group for all ranks. All ranks come to those
    # they take part in in one and the same order: boundary by boundary, activations before gradients. Of the channels
    # and groups that some rank is waiting for, take the first: a rank that is missing there cannot be waiting at a
    # later one, which it comes to afterwards, nor at an earlier one, since there is none. So it comes, and no ranks
    # wait for each other in a circle.
    pipes = mesh.pipelines()

    def channel(sender: int, receiver: int) -> Channel | None:
        """The channel from one stage to another in this rank's pipe; None where this rank is in neither."""
        groups = new_groups([pipe[sender], pipe[receiver]] for pipe in pipes)
        group = next((group for group in groups if group is not None), None)
        if group is None:
            return None
        return Channel(mesh.stage_rank(sender), mesh.stage_rank(receiver), group, dtype, device)

    links: dict[int, Link] = {}
    for after in range(1, mesh.pp_size):
        activations, gradients = channel(after - 1, after), channel(after, after - 1)
        if activations and gradients:
            links[after] = Link(activations, gradients)
    return links.get(mesh.pp_rank), links.get(mesh.pp_rank + 1)
