"""Attention by the kernels of `skvr_kernels`: sequences with donors each read them in one launch, without a copy.

A stage's layers write their keys and values into an arena, from which later layers read; those that come from earlier
stages are written before the first layer runs. Autograd sees no arena, only a token that runs through all writes and
reads in their order (`skvr_kernels.attention`). It lies in the arena of the micro-batch, not among the arguments of
layers: where a layer is recomputed it writes again what is there already, with a token of its own that nobody keeps,
and the order stays that of the first time.

Shapes: B batch, S sequence, R rows of donors, H query heads, K key/value heads, E head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

import torch
from torch import Tensor

from skvr_dist.model.devices import to_device
from skvr_dist.model.documents import Documents
from skvr_dist.routing import KVPart

if TYPE_CHECKING:
    import skvr_kernels


class _KV(Protocol):
    """Keys and values, [B, S, K, E] each, or those of a row's sequences (`skvr_dist.model.decoder.KV`)."""

    @property
    def k(self) -> Tensor: ...

    @property
    def v(self) -> Tensor: ...

    def rows(self, count: int) -> tuple[Self, ...]:
        """These of each row, as views."""


_Own = TypeVar("_Own", bound=_KV)


class ArenaGradients:
    """The gradients of a stage's arenas, which are zero between two backward passes and so serve all micro-batches."""

    def __init__(self) -> None:
        self._held: Tensor | None = None

    def of(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Zeros of an arena's shape, float32 [slots, 2, B, S, K, E]."""
        held = self._held
        if held is None or held.shape[1:] != torch.Size(shape[1:]) or len(held) < shape[0] or held.device != device:
            self._held = held = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        return held[: shape[0]]


class StageArena:
    """The keys and values that one micro-batch's layers read on one stage.

    Args:
        layers: of this stage.
        donors: int [R][L], for the whole decoder.
        batch: B, which R divides.
        documents: those that queries are confined to, on the device; None: nothing.
    """

    def __init__(
        self,
        layers: range,
        donors: Sequence[Sequence[int]],
        batch: int,
        device: torch.device,
        documents: Documents | None,
        gradients: ArenaGradients,
    ) -> None:
        self.rows = len(donors)
        """R."""
        self._layers, self._batch, self._device, self._gradients = layers, batch, device, gradients
        self._documents = documents
        self._with_gradients = torch.is_grad_enabled()  # now: a layer that is recomputed may run without
        read = {row[layer] for row in donors for layer in layers}
        own = [layer for layer in layers if layer in read]
        # Of earlier stages' layers each row reads others: the first that each of them reads share a slot, and so on.
        self._crossing = [sorted({row[layer] for layer in layers if row[layer] < layers.start}) for row in donors]
        self._waves = max(map(len, self._crossing))
        self._slots = {(layer, row): slot for slot, layer in enumerate(own) for row in range(self.rows)}
        for row, crossing in enumerate(self._crossing):
            self._slots |= {(layer, row): len(own) + wave for wave, layer in enumerate(crossing)}
        self.slots = len(own) + self._waves
        """Places for the keys and values of a layer."""
        numbers = [self._of_sequences([self._slots[row[layer], r] for r, row in enumerate(donors)]) for layer in layers]
        numbers += [[slot] * batch for slot in range(self.slots)]
        table = to_device(torch.tensor(numbers, dtype=torch.int64), device)
        self._reads, self._writes = table.split([len(layers), self.slots])
        self._arena: skvr_kernels.Arena | None = None
        self._token: Tensor | None = None
        self._is_open = True
        self._bounds: skvr_kernels.Documents | None = None

    def _of_sequences(self, rows: Sequence[int]) -> list[int]:
        return [each for each in rows for _ in range(self._batch // self.rows)]

    def receive(self, crossing: Mapping[KVPart, _KV]) -> None:
        """Write the keys and values of earlier stages' layers that are read here."""
        for wave in range(self._waves):
            parts = [
                crossing[layers[wave], row] if wave < len(layers) else None for row, layers in enumerate(self._crossing)
            ]
            one = next(part for part in parts if part is not None)
            nothing = torch.zeros_like(one.k)
            k = torch.cat([nothing if part is None else part.k for part in parts])
            v = torch.cat([nothing if part is None else part.v for part in parts])
            self._write(self.slots - self._waves + wave, k, v)

    def layer(self, number: int) -> ArenaLayer:
        """What a layer of this stage writes and reads."""
        return ArenaLayer(self, number)

    def write(self, layer: int, kv: _KV) -> None:
        """Keep a layer's own keys and values [B, S, K, E]; not those that later stages alone read."""
        if (layer, 0) in self._slots:
            self._write(self._slots[layer, 0], kv.k, kv.v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention of a layer's queries [B, S, H, E] to what its donors have written; of the same shape."""
        import skvr_kernels

        assert self._arena is not None and self._bounds is not None
        reads = self._reads[layer - self._layers.start]
        out, token = skvr_kernels.attend(self._arena, reads, q, self._bounds, self._token_now())
        self._go_on_from(token)
        return out

    def close(self) -> None:
        """All layers have run: whatever comes is recomputed for the backward pass, of which no graph is to be kept."""
        self._is_open, self._token = False, None

    def _token_now(self) -> Tensor:
        import skvr_kernels

        return skvr_kernels.arena_token(self._device) if self._token is None else self._token

    def _go_on_from(self, token: Tensor) -> None:
        if self._is_open:
            self._token = token

    def _write(self, slot: int, k: Tensor, v: Tensor) -> None:
        import skvr_kernels

        if self._arena is None:
            self._make_arena(k)
        assert self._arena is not None
        self._go_on_from(skvr_kernels.write(self._arena, self._writes[slot], k, v, self._token_now()))

    def _make_arena(self, k: Tensor) -> None:
        import skvr_kernels

        shape, of_gradients = (self.slots, *k.shape), (self.slots, 2, *k.shape)
        if self._with_gradients:
            gradients = self._gradients.of(of_gradients, k.device)
        else:  # nobody adds to them: one zero stands for all
            gradients = torch.zeros((), dtype=torch.float32, device=k.device).expand(of_gradients)
        self._arena = skvr_kernels.Arena(*shape, dtype=k.dtype, device=k.device, gradients=gradients)
        if self._documents is None:
            self._bounds = skvr_kernels.Documents.joined(k.shape[0], k.shape[1], k.device)
        else:
            self._bounds = skvr_kernels.Documents.of((self._documents.positions == 0).cumsum(1))


@dataclass(frozen=True, eq=False)
class ArenaLayer:
    """One layer's place in its micro-batch's arena; a layer takes it instead of donors' keys and values."""

    arena: StageArena
    number: int

    def keep(self, own: _Own) -> tuple[_Own, ...]:
        """Keep the layer's own keys and values [B, S, K, E]; returns them by row."""
        self.arena.write(self.number, own)
        return own.rows(self.arena.rows)

    def attend(self, q: Tensor) -> Tensor:
        """Attention of its queries [B, S, H, E]."""
        return self.arena.attend(self.number, q)
