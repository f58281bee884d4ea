"""Asks a mount for the state of a file, and waits until the whole file is on this host.

A page of a mapped file that does not come is a SIGBUS, which ends the program without a word. So all of a file is read
before it is mapped, and what cannot be read is an exception.
"""

import fcntl
import io
import os
import sys

_IOC_STATE = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
_VERIFIED, _COMMON = 1, 8
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20
_PROBLEM, _REPLACED = "user.trims.problem", "user.trims.replaced"


def ensure_local(file: io.FileIO) -> bool | None:
    """Wait until all of an open file is on this host.

    Returns whether the mount lists what the file shares with another, and None for a file on no mount. A bind mount of
    a mount, as in a container, counts as one. Raises OSError, which names the file and why it cannot be completed.
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
    """The error of a file on a mount, given by its descriptor or path, with what the server knows of the cause."""
    try:
        cause = os.getxattr(file, _PROBLEM).decode(errors="replace")
    except OSError:  # the server knows of none, or the file is on no mount
        return OSError(error.errno, error.strerror, path)
    remedy = "try again once the store answers, see `trimsfs status`"
    return OSError(error.errno, f"{error.strerror}: cannot be completed: {cause}: {remedy}", path)


def is_replaced(file: io.FileIO) -> bool:
    """Whether the mount of an open file knows that the store has another content for it by now."""
    try:
        return os.getxattr(file.fileno(), _REPLACED) == b"true"
    except OSError:  # on no mount, or on one of an earlier version
        return False


def on_mount(file: io.FileIO) -> bool:
    """Whether an open file is on a mount."""
    return _state(file) is not None


def _state(file: io.FileIO) -> int | None:
    """The flags of a file on a mount; None for a file on no mount."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(file.fileno(), _IOC_STATE, answer, True)
    except OSError:
        return None
    return int.from_bytes(answer, sys.byteorder)
