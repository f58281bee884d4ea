"""Where a file is: on a mount or not, on this host or still to be fetched."""

import fcntl
import io
import os
import sys

_IOC_STATE = 2 << 30 | 4 << 16 | ord("t") << 8 | 0x71
_VERIFIED, _COMMON = 1, 8
"""As in ``trimsfs/fuse/trimsfs.h``."""
_PIECE = 8 << 20


def ensure_local(file: io.FileIO) -> bool | None:
    """Return when all of an open file is on this host: whether the mount tells what it has in common with others, and
    None of a file that is on no mount.

    A bind mount of a mount, as in a container, is one too. Raises OSError.
    """
    state = _state(file)
    if state is None:
        return None
    if not state & _VERIFIED:
        buffer, offset = bytearray(_PIECE), 0
        while count := os.preadv(file.fileno(), [buffer], offset):  # at no position, which threads would share
            offset += count
    return bool(state & _COMMON)


def on_mount(file: io.FileIO) -> bool:
    """Whether an open file is on a mount."""
    return _state(file) is not None


def _state(file: io.FileIO) -> int | None:
    """Flags of a file of a mount; None of one that is on no mount."""
    answer = bytearray(4)
    try:
        fcntl.ioctl(file.fileno(), _IOC_STATE, answer, True)
    except OSError:
        return None
    return int.from_bytes(answer, sys.byteorder)
