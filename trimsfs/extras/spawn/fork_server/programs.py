"""The processes that a fork server deals with: callers, their forks, and what this process itself is once it is one."""

import socket
from contextlib import suppress
from typing import Any

from trimsfs.extras.spawn.fork_server.joining import Peer
from trimsfs.extras.spawn.fork_server.preloading import imported_since
from trimsfs.extras.spawn.messages import Receiver, send

Message = dict[str, Any]


class Program:
    """What this process is to run, once it is a fork: the *order* of its caller, and how to tell what it imported."""

    def __init__(self, order: Message, channel: socket.socket, known: set[str] | None) -> None:
        self.order = order
        self._channel = channel
        self._known = known
        if known is None:
            channel.close()

    def tell_imports(self) -> None:
        """Tell the server what the program imported, if it learns that."""
        if self._known is not None:
            with suppress(OSError):  # the server has ended
                send(self._channel, {"is": "imported", "modules": imported_since(self._known, self.order["directory"])})
            self._channel.close()


class Caller:
    """A process that asks: its connection, and the program that was forked for it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.receiver = Receiver(connection)
        self.fork: Fork | None = None

    def tell(self, message: Message) -> None:
        with suppress(OSError):  # it has ended: the end of its connection tells
            send(self.connection, message)


class Fork:
    """A program: its process, and the channel to it."""

    def __init__(self, pid: int, channel: socket.socket, caller: Caller, peer: Peer | None) -> None:
        self.pid = pid
        self.channel = channel
        self.receiver = Receiver(channel)
        self.caller = caller
        self.peer = peer
        self.may_run = False
        """Whether it is what its caller is. It waits for the caller's word then."""

    def joined(self) -> str | None:
        """Put it where its caller is, as far as only the server can; why it must not run, or None."""
        if self.peer is None:
            return None
        self.peer.place(self.pid)
        return self.peer.difference(self.pid)

    def close(self) -> None:
        """Hear it no more."""
        self.receiver.close()
        if self.peer is not None:
            self.peer.close()
