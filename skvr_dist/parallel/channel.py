"""One direction of one stage boundary: tensors that arrive in the order they were sent, while both sides compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

# One tensor on its way while the next is made; more would only hold memory.
_SENDS_IN_FLIGHT = 2


class Channel:
    """Carries flat tensors from one rank to one other.

    Every direction of every boundary has a group of its own, on which a rank only sends or only receives. So a receive
    can be posted before its tensor is due and can never stand in the way of anything else: on NCCL the operations of a
    group wait for each other.

    Args:
        group: sender and receiver, and nobody else.
    """

    def __init__(
        self, sender: int, receiver: int, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._group = group
        self._sender, self._receiver = sender, receiver
        self._dtype, self._device = dtype, device
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()
        self._sizes: Iterator[int] = iter(())
        self._posted: tuple[dist.Work, Tensor] | None = None

    def send(self, tensor: Tensor) -> None:
        """Start to send; it goes on while this rank computes."""
        self._sends.append((_started(dist.isend(tensor, self._receiver, group=self._group)), tensor))
        self.finish_sends(leave=_SENDS_IN_FLIGHT)

    def finish_sends(self, leave: int = 0) -> None:
        """Wait for the oldest sends, and free their tensors, until at most `leave` are on their way."""
        while len(self._sends) > leave:
            work, _ = self._sends.popleft()
            work.wait()

    def expect(self, sizes: Iterable[int]) -> None:
        """Say how many elements each of the next tensors has, and start to receive the first."""
        self._sizes = iter(sizes)
        self._post()

    def receive(self) -> Tensor:
        """The next tensor [N]; the one after it is being received when this returns."""
        assert self._posted is not None, "more tensors received than expected"
        work, tensor = self._posted
        work.wait()
        self._post()
        return tensor

    def _post(self) -> None:
        size = next(self._sizes, None)
        if size is None:
            self._posted = None
            return
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        self._posted = (_started(dist.irecv(tensor, self._sender, group=self._group)), tensor)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the channel's group"
    return work
