"""The messages between a caller and its fork server: JSON objects, with descriptors, over a Unix stream socket.

A message is a header, one byte for each group of descriptors, and the JSON text; the header tells how much follows.
"""

import fcntl
import json
import os
import socket
import struct
from array import array
from collections.abc import Sequence
from typing import Any

PROTOCOL = 1
"""Of callers and servers that understand each other."""
GROUP = 250
"""So many descriptors go with one byte: the kernel takes 253."""
_HEADER = struct.Struct("!II")
"""The length of the JSON text in bytes, and the number of descriptors."""
_CREDENTIALS = struct.Struct("iII")
_PIECE = 1 << 18
MOST_BYTES, MOST_DESCRIPTORS = 64 << 20, 1 << 16
"""No order is larger: the kernel gives a program 6 MiB of arguments and variables, and JSON may write each six-fold."""


def send(channel: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message. Raises OSError."""
    text = json.dumps(message).encode()
    channel.sendall(_HEADER.pack(len(text), len(descriptors)))
    for start in range(0, len(descriptors), GROUP):
        group = array("i", descriptors[start : start + GROUP])
        channel.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, group)])
    channel.sendall(text)


def raised(number: int, first: int) -> int:
    """Move a descriptor to a number from *first* up; programs that this process starts do not get it. Raises OSError.

    It is closed if there is no such number.
    """
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, first)
    finally:
        os.close(number)


def peer(channel: socket.socket) -> tuple[int, int, int]:
    """The pid, the user and the group at the other end; pid 0 where it is in a PID namespace that is not seen here."""
    pid, user, group = _CREDENTIALS.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, user, group


class Receiver:
    """Puts the messages of one socket together, whatever pieces they arrive in.

    Descriptors get numbers from *first* up.
    """

    def __init__(self, channel: socket.socket, first: int = 0, *, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        """Of a message; it may be changed."""
        self.takes_descriptors = False
        self._channel = channel
        self._first = first
        self._bytes = bytearray()
        self._descriptors: list[int] = []

    def read(self, flags: int = 0) -> None:
        """Read what there is. Raises EOFError at the end, OSError, and BlockingIOError if there is nothing yet."""
        ancillary = socket.CMSG_SPACE(GROUP * 4) if self.takes_descriptors else 0
        piece, controls, state, _ = self._channel.recvmsg(_PIECE, ancillary, flags | socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in controls:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                before = len(self._descriptors)
                self._descriptors += numbers
                for at, number in enumerate(numbers if self._first else (), before):
                    self._descriptors[at] = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, self._first)
                    os.close(number)
        if state & socket.MSG_CTRUNC:
            raise OSError("descriptors were lost: this process may open no more, or takes none")
        if not piece:
            raise EOFError
        self._bytes += piece

    def message(self) -> tuple[dict[str, Any], list[int]] | None:
        """The next message and its descriptors, which are the caller's to close; None until it is whole.

        Raises ValueError for what is none.
        """
        if len(self._bytes) < _HEADER.size:
            return None
        length, count = _HEADER.unpack_from(self._bytes)
        if length > self.most_bytes or count > MOST_DESCRIPTORS:
            raise ValueError(f"a message of {length} bytes and {count} descriptors")
        start = _HEADER.size + -(-count // GROUP)
        if len(self._bytes) < start + length or len(self._descriptors) < count:
            return None
        message = json.loads(self._bytes[start : start + length])
        descriptors = self._descriptors[:count]
        del self._bytes[: start + length], self._descriptors[:count]
        return message, descriptors

    def wait(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for the next message. Raises EOFError and OSError; TimeoutError after the socket's own timeout."""
        while (whole := self.message()) is None:
            self.read()
        return whole

    def close(self) -> None:
        """Close the socket, and the descriptors of a message that never became whole."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._channel.close()
