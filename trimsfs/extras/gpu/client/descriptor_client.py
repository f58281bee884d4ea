"""Exchanges a lease's token for a descriptor of the copy's memory, over the server's socket."""

import array
import json
import select
import socket
import struct
from contextlib import suppress

from trimsfs.extras.gpu.client import fork_safety
from trimsfs.extras.gpu.client.gpu_errors import GpuError

TIMEOUT_S = 30.0
"""How long the server may take for each step: a takeover may be under way."""
_MESSAGE_SIZE = 1 << 16
_DESCRIPTOR = array.array("i").itemsize
_MOST_DESCRIPTORS = 4
_UNKNOWN = "NoSuchEntryError"
"""The error kind for a token that this server does not know."""


class NotYetError(GpuError):
    """A refusal by a server that may just have started: the lease soon names another token or a socket."""


def receive(path: str, token: str) -> tuple[fork_safety.Descriptor, int]:
    """Receive a descriptor of the memory, which the caller closes, and the memory's size in bytes.

    Raises GpuError, NotYetError.
    """
    if not path:
        raise NotYetError("the mount has no socket for GPU clients: its log says why")
    with fork_safety.guard:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept = fork_safety.Descriptor(connection.fileno())  # a forked child would keep the connection's lease
    try:
        message, descriptors = _answer(connection, path, token)
    except (ConnectionResetError, BrokenPipeError) as error:
        raise NotYetError(_unreachable(path, error)) from None
    except OSError as error:
        raise GpuError(_unreachable(path, error)) from None
    finally:
        connection.detach()
        kept.close()
    try:
        return _taken(path, message, descriptors)
    except BaseException:
        for descriptor in descriptors[:1]:
            descriptor.close()
        raise
    finally:
        for descriptor in descriptors[1:]:
            descriptor.close()


def _answer(connection: socket.socket, path: str, token: str) -> tuple[bytes, list[fork_safety.Descriptor]]:
    """Send the token, and wait for the answer. Raises OSError."""
    # Not settimeout(): with it, connect() fails instead of waiting while the server's backlog is full.
    limit = struct.pack("ll", int(TIMEOUT_S), int(TIMEOUT_S % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    connection.connect(path)
    with suppress(BrokenPipeError):  # the server has refused already
        connection.send(json.dumps({"token": token}).encode())
    waiting = select.poll()
    waiting.register(connection, select.POLLIN)
    waiting.poll(TIMEOUT_S * 1000)
    with fork_safety.guard:
        return _received(connection)


def _received(connection: socket.socket) -> tuple[bytes, list[fork_safety.Descriptor]]:
    """Receive without waiting.

    Not by ``socket.recv_fds``, which ignores flags: a program started meanwhile would inherit the descriptors.
    """
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR)
    flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    message, ancillary, _, _ = connection.recvmsg(_MESSAGE_SIZE, room, flags)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // _DESCRIPTOR * _DESCRIPTOR])
    return message, list(map(fork_safety.Descriptor, descriptors))


def _taken(path: str, message: bytes, descriptors: list[fork_safety.Descriptor]) -> tuple[fork_safety.Descriptor, int]:
    """Parse the answer: the descriptor and the size. Raises GpuError, NotYetError."""
    if not message:
        raise NotYetError(f"{path}: the server closed the connection")
    try:
        answer = json.loads(message)
        if "error" not in answer:
            return descriptors[0], int(answer["size"])
        kind = NotYetError if answer.get("kind") == _UNKNOWN else GpuError
        error = kind(f"{path}: {answer['error']}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        error = GpuError(f"{path}: invalid answer: update client and server to the same version")
    raise error


def _unreachable(path: str, error: OSError) -> str:
    match error:
        case BlockingIOError():
            return f"{path}: no answer within {TIMEOUT_S:.0f} s: see the log of the mount"
        case FileNotFoundError() | ConnectionRefusedError():
            return f"{path}: {error.strerror}: mount the socket into the container (docs/containers.md)"
        case PermissionError():
            return f"{path}: {error.strerror}: this user may not use the socket"
    return f"{path}: {error.strerror or error}"
