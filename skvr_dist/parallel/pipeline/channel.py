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

    Making one is collective over its two ranks. NCCL connects them when they first use the group, and holds the host
    of the first to come until the other has come too. So that this never happens in the middle of a step, where the
    other may be waiting for something else of this rank, a channel is used once when it is made.

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
        self._ahead = True
        self._posted: tuple[dist.Work, Tensor] | None = None
        self._connect()

    def _connect(self) -> None:
        """Use the channel once, for a dummy element."""
        if dist.get_rank() == self._sender:
            self.send(torch.zeros(1, dtype=self._dtype, device=self._device))
            self.finish_sends()
        else:
            self.expect([1])
            self.receive()

    def send(self, tensor: Tensor) -> None:
        """Start to send, and return; the tensor travels while this rank computes."""
        self._sends.append((_started(dist.isend(tensor, self._receiver, group=self._group)), tensor))
        self.finish_sends(leave=_SENDS_IN_FLIGHT)

    def finish_sends(self, leave: int = 0) -> None:
        """Wait for the oldest sends, and free their tensors, until at most `leave` are on their way."""
        while len(self._sends) > leave:
            work, _ = self._sends.popleft()
            work.wait()

    def expect(self, sizes: Iterable[int], ahead: bool = True) -> None:
        """Say how many elements each of the next tensors has, and whether each is received ahead of its turn.

        Nothing is posted yet. On NCCL a posted receive occupies the device until its tensor has come, and holds up
        whatever synchronises the device: an allocation that must free memory first, a kernel that is loaded when it is
        first launched. The first gradients come only after forward passes of this rank, which would never run.
        """
        assert self._posted is None, "tensors that were expected before have not been received"
        self._sizes = iter(sizes)
        self._ahead = ahead

    def receive(self) -> Tensor:
        """The next tensor [N]; the one after it is being received when this returns, if it is to be ahead."""
        posted = self._posted or self._post()
        assert posted is not None, "more tensors received than expected"
        work, tensor = posted
        work.wait()
        self._posted = self._post() if self._ahead else None
        return tensor

    def _post(self) -> tuple[dist.Work, Tensor] | None:
        size = next(self._sizes, None)
        if size is None:
            return None
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        return _started(dist.irecv(tensor, self._sender, group=self._group)), tensor


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not in the channel's group"
    return work
