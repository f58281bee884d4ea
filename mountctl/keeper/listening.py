"""Hears the servers of a mount, in the keeper's loop, until it parts with them."""

import contextlib
import os
import selectors
from collections.abc import Callable

from mountctl.keeper import protocol
from mountctl.keeper.reporting import Reporter
from mountctl.keeper.server_process import Server


class Hearing:
    """Hears servers. *handle* gets each message with what descriptors came with it; those that it leaves are closed.

    A server of whose message it raises ProtocolError is killed.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        reporter: Reporter,
        handle: Callable[[Server, protocol.Message, list[int]], None],
    ) -> None:
        self._selector = selector
        self._reporter = reporter
        self._handle = handle
        self._parted: list[Server] = []

    def begin(self, server: Server) -> None:
        """Hear a server from now on."""
        self._selector.register(server.channel, selectors.EVENT_READ, lambda: self.hear(server))

    def hear(self, server: Server) -> None:
        """Hear what a server has said."""
        try:
            if not self._hear_next(server):
                self._deafen(server)  # its end will be seen
        except protocol.ProtocolError as error:
            self._reporter.log(f"the server (pid {server.pid}) said what it must not: {error}: killing it")
            server.kill()

    def hear_last(self, server: Server) -> None:
        """Hear what a server that has ended has still said."""
        with contextlib.suppress(protocol.ProtocolError):
            while server.channel.fileno() >= 0 and server.speaks() and self._hear_next(server):
                pass

    def part(self, server: Server) -> None:
        """Hear a server no more, whether it has ended or is to."""
        self._deafen(server)
        server.channel.close()
        self._parted.append(server)

    def look(self) -> None:
        """Take note of the ends of those that were parted with."""
        self._parted = [server for server in self._parted if not server.reaped()]

    def _hear_next(self, server: Server) -> bool:
        """Have a message handled; whether there was any. Raises ProtocolError."""
        message, descriptors = server.receive()
        if message is None:
            return False
        try:
            self._handle(server, message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _deafen(self, server: Server) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(server.channel)
