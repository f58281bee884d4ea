"""Messages with descriptors over a Unix socket."""

import array
import socket
from collections.abc import Iterable

_SCM_PIDFD = 4
_DESCRIPTOR = array.array("i").itemsize


def send(end: socket.socket, data: bytes, descriptors: Iterable[int] = (), *, flags: int = 0) -> None:
    """Send a message with descriptors. Raises OSError. ``socket.send_fds`` ignores its flags."""
    rights = array.array("i", descriptors)
    end.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [], flags)


def receive(end: socket.socket, limit: int, most: int) -> tuple[bytes, list[int], int | None]:
    """Receive a message of at most *limit* bytes and *most* descriptors; with the sender's pidfd, if the socket is set
    to pass it. Raises OSError.

    Descriptors are close-on-exec, so that children do not inherit them; ``socket.recv_fds`` ignores its flags.
    """
    room = socket.CMSG_SPACE(most * _DESCRIPTOR) + socket.CMSG_SPACE(_DESCRIPTOR)
    data, ancillary, _, _ = end.recvmsg(limit, room, socket.MSG_CMSG_CLOEXEC)
    descriptors, pidfds = array.array("i"), array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind in {socket.SCM_RIGHTS, _SCM_PIDFD}:
            numbers = descriptors if kind == socket.SCM_RIGHTS else pidfds
            numbers.frombytes(content[: len(content) // _DESCRIPTOR * _DESCRIPTOR])
    return data, list(descriptors), next((pidfd for pidfd in pidfds if pidfd >= 0), None)
