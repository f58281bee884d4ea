"""Channel: JSON messages and descriptors between two processes of a mount, over a Unix socket pair."""

import array
import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any

import trio

MESSAGE_LIMIT = 65536
DESCRIPTORS_LIMIT = 4

_CREDENTIALS = struct.Struct("=iII")

Message = dict[str, Any]


class ChannelClosedError(Exception):
    """The process at the other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of sockets that keep message boundaries; an exec closes them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Channel:
    """One end of a socket pair, for trio. For one sender, besides `post`, and one receiver at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._socket = trio.socket.from_stdlib_socket(end)

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message with copies of descriptors. Raises ChannelClosedError."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            await self._socket.sendmsg([json.dumps(message).encode()], rights)
        except (OSError, trio.ClosedResourceError) as error:  # the latter: closed at this end meanwhile
            raise ChannelClosedError(str(error)) from error

    async def refuse(self, message: Message) -> None:
        """Discard the peer's unread messages and send it a last one. Raises ChannelClosedError."""
        try:
            # A close with messages unread would reset the connection before the peer reads this one.
            self._end.shutdown(socket.SHUT_RD)
            while self._end.recv(1):
                pass
        except OSError as error:
            raise ChannelClosedError(str(error)) from error
        await self.send(message)

    def post(self, message: Message) -> None:
        """Send a message from any thread; block while the peer is slow. Raises ChannelClosedError."""
        data = json.dumps(message).encode()
        while True:
            try:
                self._end.send(data)
            except BlockingIOError:
                writable = select.poll()
                writable.register(self._end, select.POLLOUT)
                writable.poll()
            except OSError as error:
                raise ChannelClosedError(str(error)) from error
            else:
                return

    def try_post(self, message: Message) -> None:
        """Send a message; drop it if the peer is slow or gone."""
        with contextlib.suppress(OSError):
            self._end.send(json.dumps(message).encode())

    async def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors. Raises ChannelClosedError if the peer is gone or sends no JSON."""
        size = socket.CMSG_SPACE(DESCRIPTORS_LIMIT * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = await self._socket.recvmsg(MESSAGE_LIMIT, size, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        try:
            return json.loads(data), list(descriptors)
        except (ValueError, RecursionError) as error:  # also of no data, which may bring descriptors, too
            for descriptor in descriptors:
                os.close(descriptor)
            raise ChannelClosedError("invalid message" if data else "closed by the other end") from error

    def peer(self) -> tuple[int, int]:
        """The pid, 0 in another PID namespace, and uid of the peer when it connected. Raises OSError."""
        pid, uid, _ = _CREDENTIALS.unpack(
            self._end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        return pid, uid

    def close(self) -> None:
        self._socket.close()
