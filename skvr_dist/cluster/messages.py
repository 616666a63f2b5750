"""Messages between a supervisor and its agents: JSON objects, a line each, over TCP.

Every message is a sign of life, so a side that hears nothing for long enough takes the other for lost, whether its
process has gone, its host has no power or the link between them is cut.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

BEAT_SECONDS = 1.0
"""Between two signs of life."""
Message = dict[str, Any]


class Connection:
    """One end of a connection; it closes itself when the other end has, or when nothing can be sent.

    Args:
        connected: a connected TCP socket, which this object owns from now on.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._unread, self._unsent = connected, b"", b""
        self._heard = self._beaten = time.monotonic()
        self.closed = False

    def fileno(self) -> int:
        """For `select`; only while it is open."""
        return self._socket.fileno()

    def silent_seconds(self) -> float:
        """Since anything was heard from the other end."""
        return time.monotonic() - self._heard

    def send(self, kind: str, **content: Any) -> None:
        """Send a message, now or, where the other end does not read, later; nothing once the connection is closed."""
        if not self.closed:
            self._unsent += json.dumps({"kind": kind, **content}).encode() + b"\n"
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                pass
            except OSError:
                self.close()

    def beat(self) -> None:
        """Send a sign of life if it is time."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._beaten = time.monotonic()
            self.send("beat")

    def receive(self) -> list[Message]:
        """What has arrived in whole, without waiting."""
        try:
            while not self.closed and (came := self._socket.recv(2**16)):
                self._unread += came
                self._heard = time.monotonic()
            self.close()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        *lines, self._unread = self._unread.split(b"\n")
        messages = []
        for line in lines:
            with contextlib.suppress(ValueError):  # whoever sends something else has no token either
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Close the connection; the other end notices."""
        self.closed = True
        self._socket.close()
