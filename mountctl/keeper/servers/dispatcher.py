"""Receives the messages of a mount's servers in the keeper's loop, and hands each to the keeper."""

import contextlib
import os
import selectors
import signal
from collections.abc import Callable

from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.forked_server import reap_orphans
from mountctl.keeper.servers.server_process import ServerProcess
from trimsfs.processes import StopWatch


class Dispatcher:
    """Calls *handle* with each message and its descriptors; closes the descriptors that *handle* leaves in the list.

    Kills a server that violates the protocol.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        reporter: Reporter,
        handle: Callable[[ServerProcess, server_messages.Message, list[int]], None],
    ) -> None:
        self._selector = selector
        self._reporter = reporter
        self._handle = handle
        self._servers: list[ServerProcess] = []
        self._unreaped: list[ServerProcess] = []
        self._orphans: dict[int, StopWatch] = {}

    def add(self, server: ServerProcess) -> None:
        self._servers.append(server)
        self._selector.register(server.channel, selectors.EVENT_READ, lambda: self.receive(server))

    def receive(self, server: ServerProcess) -> None:
        try:
            if not self._receive_next(server):
                self._unregister(server)  # the keeper's loop notices that it has ended
        except server_messages.ProtocolError as error:
            self._reporter.error(f"server {server.pid} violated the protocol: {error}: killing it")
            server.kill()

    def drain(self, server: ServerProcess) -> None:
        """Handle the messages that a server sent before it ended."""
        with contextlib.suppress(server_messages.ProtocolError):
            while server.channel.fileno() >= 0 and server.has_message() and self._receive_next(server):
                pass

    def remove(self, server: ServerProcess) -> None:
        """Receive no more messages of a server, whether it has ended or will be killed."""
        self._unregister(server)
        server.channel.close()
        self._servers = [other for other in self._servers if other is not server]
        self._unreaped.append(server)

    def reap(self) -> None:
        """Collect the exit codes of removed servers that have ended, and of processes that servers left behind.

        Kills of the latter those that are stopped: they do not notice that their server has ended.
        """
        self._unreaped = [server for server in self._unreaped if not server.reaped()]
        left = reap_orphans([*self._servers, *self._unreaped])
        self._orphans = {pid: self._orphans.get(pid) or StopWatch() for pid in left}
        for pid, watch in self._orphans.items():
            if watch.stays_stopped(pid):
                with contextlib.suppress(OSError):  # it has ended, or has become another user's
                    os.kill(pid, signal.SIGKILL)

    def _receive_next(self, server: ServerProcess) -> bool:
        """Handle the next message; False if the channel has ended. Raises ProtocolError."""
        message, descriptors = server.receive()
        if message is None:
            return False
        try:
            self._handle(server, message, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _unregister(self, server: ServerProcess) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(server.channel)
