"""Asks a mount for the state of a file, and waits until the whole file is on this host.

If a page of a mapped file cannot be fetched, the program gets SIGBUS and dies without a message. So the client reads
the whole file before it maps it: a failed read raises an exception.
"""

import errno
import fcntl
import io
import os
import sys

_IOC_STATE = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
_VERIFIED, _COMMON = 1, 8
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20
_PROBLEM, _REPLACED, _GENERATION = "user.trims.problem", "user.trims.replaced", "user.trims.generation"


def ensure_local(file: io.FileIO) -> bool | None:
    """Wait until all of an open file is on this host.

    Returns whether the mount lists blocks that the file shares with another, or None for a file off a mount. A bind
    mount of a mount counts as a mount. Raises OSError, which names the file and the cause.
    """
    state = _state(file)
    if state is None:
        return None
    if not state & _VERIFIED:
        buffer, offset = bytearray(_PIECE), 0
        try:
            while count := os.preadv(file.fileno(), [buffer], offset):  # pread: threads share the file position
                offset += count
        except OSError as error:
            raise explained(error, file.fileno(), os.fsdecode(file.name)) from None
    return bool(state & _COMMON)


def explained(error: OSError, file: int | str, path: str) -> OSError:
    """Return *error* with the file's *path* and, if the server knows it, the cause; *file* is a descriptor or path."""
    try:
        cause = os.getxattr(file, _PROBLEM).decode(errors="replace")
    except OSError:  # the server knows no cause, or the file is off a mount
        return OSError(error.errno, error.strerror, path)
    # A refusal, or a cause that names a command, has its own remedy: the store does answer.
    own = error.errno == errno.EACCES or "`" in cause
    remedy = "" if own else ": try again once the store answers, see `trimsfs status`"
    return OSError(error.errno, f"{error.strerror}: cannot be completed: {cause}{remedy}", path)


def is_replaced(file: io.FileIO) -> bool:
    """Whether the store has replaced an open file, as far as its mount knows."""
    try:
        return os.getxattr(file.fileno(), _REPLACED) == b"true"
    except OSError:  # off a mount, or on a mount of an earlier version
        return False


def generation_of(file: io.FileIO) -> str | None:
    """The generation of an open file; None if there is none to be had, as off a mount."""
    try:
        return os.getxattr(file.fileno(), _GENERATION).decode()
    except OSError:
        return None


def is_local(file: io.FileIO) -> bool:
    """Whether all of an open file is on this host, as is a file off a mount."""
    state = _state(file)
    return state is None or bool(state & _VERIFIED)


def on_mount(file: io.FileIO) -> bool:
    """Whether an open file is on a mount."""
    return _state(file) is not None


def _state(file: io.FileIO) -> int | None:
    """The flags of a file on a mount; None for a file off a mount."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(file.fileno(), _IOC_STATE, answer, True)
    except OSError:
        return None
    return int.from_bytes(answer, sys.byteorder)
