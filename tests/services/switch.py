"""A TCP proxy in front of a test server, to take the server away and give it back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Self

from . import HOST, S3Server, reserved_ports

PIECE = 1 << 16


@dataclass(slots=True)
class Switch:
    """Forwards connections while it is on. Off, it breaks those there are and accepts no new ones.

    Held, connections stay and are made, and nothing comes through any of them.
    """

    target: tuple[str, int]
    port: int
    """One that nobody else takes while it is off."""
    _listener: socket.socket | None = None
    _connections: set[socket.socket] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _flowing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self.on()
        return self

    def __exit__(self, *_: object) -> None:
        self.off()

    def on(self) -> None:
        """Listen, on the same port as before."""
        self._flowing.set()
        self._listener = socket.create_server((HOST, self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def off(self) -> None:
        """Break every connection and refuse new ones."""
        self._flowing.set()
        if self._listener is not None:
            # A close alone leaves a thread in accept() holding the socket.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Let nothing through."""
        self._flowing.clear()

    def let_go(self) -> None:
        """Let all through that was held."""
        self._flowing.set()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                with self._lock:
                    self._connections |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE):
                self._flowing.wait()
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._connections.discard(source)
        source.close()


@contextlib.contextmanager
def switched(server: S3Server) -> Iterator[tuple[S3Server, Switch]]:
    """A server as seen through a switch, and the switch."""
    host, _, port = server.endpoint_url.removeprefix("http://").partition(":")
    with reserved_ports() as ports, Switch((host, int(port)), ports[0]) as switch:
        yield replace(server, endpoint_url=f"http://{HOST}:{switch.port}"), switch
