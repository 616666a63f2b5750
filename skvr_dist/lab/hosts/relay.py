"""A cable that can be slow: frames between two TAP devices, of a host and of the switch, held up or dropped.

Where the kernel has no netem. Started by `skvr_dist.lab.hosts.hosts`; its arguments are the processes whose network
namespaces to enter, the name of the port, and a file with «SECONDS DROP», which is read again all the time.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import selectors
import struct
import sys
import time
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x1002
_LARGEST_FRAME = 65600
_LOOK_SECONDS = 0.2


def relay(host_pid: int, switch_pid: int, port: str, control: Path) -> None:
    """Carry frames both ways, for ever."""
    ends = _tap(host_pid, "eth0"), _tap(switch_pid, port)
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chooser = selectors.DefaultSelector()
    for end in ends:
        chooser.register(end, selectors.EVENT_READ)
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    seconds, drop, looked = 0.0, False, 0.0
    while True:
        now = time.monotonic()
        if now - looked > _LOOK_SECONDS:
            looked = now
            with contextlib.suppress(OSError, ValueError):  # while it is being written
                held, dropped = control.read_text().split()
                seconds, drop = float(held), dropped == "1"
        wait = max(0.0, waiting[0][0] - now) if waiting else _LOOK_SECONDS
        for key, _ in chooser.select(wait):
            for frame in _frames(key.fd):
                if not drop:
                    waiting.append((time.monotonic() + seconds, other[key.fd], frame))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, end, frame = waiting.popleft()
            with contextlib.suppress(OSError):  # the interface is down
                os.write(end, frame)


def _frames(end: int) -> list[bytes]:
    """What has come, some of it at a time, so that no side is kept waiting."""
    frames: list[bytes] = []
    with contextlib.suppress(OSError):  # nothing more, or the interface is down
        while len(frames) < 64:
            frames.append(os.read(end, _LARGEST_FRAME))
    return frames


def _tap(pid: int, name: str) -> int:
    """A new TAP device in the network of a process."""
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(network, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device


if __name__ == "__main__":
    relay(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
