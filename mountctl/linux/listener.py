"""Listens at a path in a selector's loop."""

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path

from mountctl.linux.sockets import BoundPath, listen_at

BACKLOG = 8


class Listener:
    """Listens at a path that only its owner may use. *heard* gets each connection that has sent something.

    The one who made it drops connections that stay idle: see `drop_idle`. Raises ListenError.
    """

    def __init__(
        self,
        path: Path,
        kind: socket.SocketKind,
        selector: selectors.BaseSelector,
        heard: Callable[[socket.socket], None],
    ) -> None:
        self._selector = selector
        self._heard = heard
        self._socket = listen_at(path, kind, mode=0o600, backlog=BACKLOG)
        self._bound_path = BoundPath(self._socket)
        self._connected: dict[socket.socket, float] = {}
        """The connections that nobody has released, and when each was made, by the monotonic clock."""
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def release(self, end: socket.socket) -> None:
        """Watch a connection no more: it is the caller's now."""
        self._selector.unregister(end)
        del self._connected[end]

    def drop_idle(self, timeout_s: float) -> list[socket.socket]:
        """Close the connections that have not been released in time; returns them."""
        now = time.monotonic()
        idle = [end for end, since in self._connected.items() if now - since > timeout_s]
        for end in idle:
            self._drop(end)
        return idle

    def close(self) -> None:
        """Stop listening, and close the connections that have not been released."""
        for end in list(self._connected):
            self._drop(end)
        self._selector.unregister(self._socket)
        self._bound_path.remove()
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            end, _ = self._socket.accept()
            end.setblocking(False)
            try:
                self._selector.register(end, selectors.EVENT_READ, lambda: self._heard(end))
            except OSError:
                end.close()
                raise
            self._connected[end] = time.monotonic()

    def _drop(self, end: socket.socket) -> None:
        self.release(end)
        end.close()
