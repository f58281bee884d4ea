"""The server's socket, which gives a descriptor of a copy's memory to whoever knows the token of a lease."""

import array
import json
import os
import socket
import struct

from trimsfs.client.gpu.errors import GpuError

TIMEOUT_S = 30.0
"""How long a server may take for each step: another may be taking its place."""
_MESSAGE_SIZE = 1 << 16
_DESCRIPTOR = array.array("i").itemsize
_MOST_DESCRIPTORS = 4


def receive(path: str, token: str) -> tuple[int, int]:
    """A descriptor of the memory, to be closed by the caller, and the memory's size in bytes. Raises GpuError."""
    if not path:
        raise GpuError("the mount has no socket for clients of GPU memory: its log tells why")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            # Not settimeout(), with which a server that many connect to at once is an error and not waited for.
            limit = struct.pack("ll", int(TIMEOUT_S), int(TIMEOUT_S % 1 * 1e6))
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, limit)
            connection.connect(path)
            connection.send(json.dumps({"token": token}).encode())
            message, descriptors = _received(connection)
    except OSError as error:
        raise GpuError(_unreachable(path, error)) from None
    try:
        return _taken(path, message, descriptors)
    finally:
        for descriptor in descriptors[1:]:
            os.close(descriptor)


def _received(connection: socket.socket) -> tuple[bytes, list[int]]:
    """``socket.recv_fds`` takes flags and ignores them, and a program started meanwhile would have the descriptors."""
    room = socket.CMSG_SPACE(_MOST_DESCRIPTORS * _DESCRIPTOR)
    message, ancillary, _, _ = connection.recvmsg(_MESSAGE_SIZE, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // _DESCRIPTOR * _DESCRIPTOR])
    return message, list(descriptors)


def _taken(path: str, message: bytes, descriptors: list[int]) -> tuple[int, int]:
    try:
        told = json.loads(message) if message else {"error": "the server has closed the connection"}
        if "error" not in told:
            return descriptors[0], int(told["size"])
        error = GpuError(f"{path}: {told['error']}")
    except (ValueError, KeyError, TypeError, IndexError):
        error = GpuError(f"{path}: an answer that is not understood: are client and server of one version?")
    if descriptors:
        os.close(descriptors[0])
    raise error


def _unreachable(path: str, error: OSError) -> str:
    match error:
        case BlockingIOError():
            return f"{path}: no answer within {TIMEOUT_S:.0f} s: see the log of the mount"
        case FileNotFoundError() | ConnectionRefusedError():
            return f"{path}: {error.strerror}: give a container the socket (docs/containers.md); else no server runs"
        case PermissionError():
            return f"{path}: {error.strerror}: this user may not ask the server for memory"
    return f"{path}: {error.strerror or error}"
