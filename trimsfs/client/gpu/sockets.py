"""The server's socket, which gives a descriptor of a copy's memory to whoever knows the token of a lease."""

import json
import os
import socket

from trimsfs.client.gpu.errors import GpuError

TIMEOUT_S = 30.0
"""How long a server may take: another may be taking its place."""
_MESSAGE_SIZE = 1 << 16
_MOST_DESCRIPTORS = 4


def receive(path: str, token: str) -> tuple[int, int]:
    """A descriptor of the memory, to be closed by the caller, and the memory's size in bytes. Raises GpuError."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(path)
            connection.send(json.dumps({"token": token}).encode())
            message, descriptors, _, _ = socket.recv_fds(
                connection, _MESSAGE_SIZE, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
    except OSError as error:
        raise GpuError(_unreachable(path, error)) from None
    try:
        return _taken(path, message, descriptors)
    finally:
        for descriptor in descriptors[1:]:
            os.close(descriptor)


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
        case TimeoutError():
            return f"{path}: no answer within {TIMEOUT_S:.0f} s: see the log of the mount"
        case FileNotFoundError() | ConnectionRefusedError():
            return f"{path}: {error.strerror}: in a container, mount its directory there; else the server does not run"
        case PermissionError():
            return f"{path}: {error.strerror}: this user may not ask the server for memory"
    return f"{path}: {error.strerror or error}"
