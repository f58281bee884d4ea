"""Asks a mount for the state of a file, and waits until the whole file is on this host."""

import fcntl
import io
import os
import sys

_IOC_STATE = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
_VERIFIED, _COMMON = 1, 8
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20


def ensure_local(file: io.FileIO) -> bool | None:
    """Wait until all of an open file is on this host.

    Returns whether the mount lists what the file shares with another, and None for a file on no mount. A bind mount of
    a mount, as in a container, counts as one. Raises OSError.
    """
    state = _state(file)
    if state is None:
        return None
    if not state & _VERIFIED:
        buffer, offset = bytearray(_PIECE), 0
        while count := os.preadv(file.fileno(), [buffer], offset):  # pread: threads share the file position
            offset += count
    return bool(state & _COMMON)


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
